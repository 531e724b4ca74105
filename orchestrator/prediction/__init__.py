"""Latency of networks that nobody measured (predictor.py), also with the help of other devices (transfer.py)."""
