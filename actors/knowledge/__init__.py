"""The pool of trained blocks that initialises later trainings (FNAS section 4.3)."""
