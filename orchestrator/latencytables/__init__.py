"""`paretoray measure` and `paretoray merge`: latencies of a device as a file."""
