"""What keeps a run alive: checkpoints, resuming, guards, supervision."""
