"""Many searches as one experiment: over any key of a configuration, some at a time, compared on one page."""
