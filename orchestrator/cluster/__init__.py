"""Ray: joining a cluster, its devices and their health, GPUs, a user's own modules."""
