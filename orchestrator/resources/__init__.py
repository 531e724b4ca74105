"""What there is to run and measure on: devices, GPUs, room for workers, and nodes that are still to come."""
