"""NSS: searches the search space (specification nss)."""
