"""NVIDIA GPUs, timed with CUDA events."""
