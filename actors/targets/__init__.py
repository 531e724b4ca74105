"""Hardware targets, one file per kind."""
