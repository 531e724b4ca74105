"""The shared weights: their actor, their training over ranks, checkpoints."""
