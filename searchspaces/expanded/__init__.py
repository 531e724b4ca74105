"""The expanded space that NSS narrows to elite ones: depth and width of three stages of residual blocks."""
