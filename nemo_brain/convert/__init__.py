"""Weights from Hugging Face directories, GGUF files and seeds into Megatron GPT models of any layout, and back."""
