"""The configurations: every key with its type, bounds and meaning."""
