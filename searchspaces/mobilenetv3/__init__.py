"""Elastic MobileNetV3, the space of once-for-all (PNAG)."""
