"""What a controller of ours has to beat: random search, regularised evolution, NSGA-II."""
