"""The Megatron GPT over packed rows: layers, heads, weights, passes."""
