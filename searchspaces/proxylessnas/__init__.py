"""The layer-wise space of ProxylessNAS in which UNAS searches under a latency."""
