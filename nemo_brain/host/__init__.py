"""What is private, patched or version-dependent in NeMo, Lightning, Megatron and torch."""
