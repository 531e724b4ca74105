"""The cells of NAS-Bench-201, for which everything is tabulated."""
