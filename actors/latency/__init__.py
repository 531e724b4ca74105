"""The queue in front of devices, and one worker for each."""
