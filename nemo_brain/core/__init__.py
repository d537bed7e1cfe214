"""What all rooms speak of: groups and their rows, ranks, interruptions, requests."""
