"""The cells of DARTS as UNAS searches them: two inputs per node, each with its operation."""
