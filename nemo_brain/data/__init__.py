"""Prompt and rollout files, tokenizers, chat templates and the order in which prompts are visited."""
