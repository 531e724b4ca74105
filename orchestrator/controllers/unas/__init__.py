"""UNAS: unbiased gradients for accuracy and measured latency (specification unas)."""
