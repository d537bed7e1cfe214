"""What a run leaves to be looked at: metrics, progress, statistics, the report."""
