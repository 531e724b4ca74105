"""Weights of trained networks, for networks of other architectures."""
