"""How the shared weights of a supernet are trained."""
