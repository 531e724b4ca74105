"""Workers that score architectures, or train each by itself."""
