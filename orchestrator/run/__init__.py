"""One search from configuration to models: the state machine, its stages and its services."""
