"""Outputs from the policy: by the training ranks, or by an inference server."""
