"""The stages of a run, one file each, in the order of the state machine in orchestrator/run/search.py."""
