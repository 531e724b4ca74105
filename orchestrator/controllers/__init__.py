"""Search algorithms behind one contract (controller.py), one folder per system."""
