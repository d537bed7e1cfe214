"""What a report says of each kind of training: BRAIn, supervised fine-tuning, reward models."""
