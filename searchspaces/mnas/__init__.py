"""MnasNet's block-level space (FNAS)."""
