"""What lives on another process or machine and holds something: weights, a device, a pool."""
