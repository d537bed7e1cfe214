"""The file for a vLLM server's path (docs/remote_sampling.md)."""
