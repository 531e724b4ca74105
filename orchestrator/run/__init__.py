"""One search from configuration to models: the state machine, its stages, and what comes after a run."""
