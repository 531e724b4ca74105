"""What can be built: pure functions and modules over torch and numpy. No Ray, no files, no devices."""
