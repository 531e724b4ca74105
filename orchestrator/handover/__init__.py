"""What becomes of a chosen architecture: trained, exported, compared, measured, documented."""
