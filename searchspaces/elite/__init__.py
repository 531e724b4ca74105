"""Spaces inside a space (specification nss)."""
