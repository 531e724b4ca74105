"""Elastic EfficientNet-Lite, whose weights come from ImageNet."""
