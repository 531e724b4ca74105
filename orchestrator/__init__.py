"""Who decides: controllers, and the run around them."""
import os

# Read when torch is loaded, so set here. Torch's threads spin while they wait for each other; where another process
# wants the core, a step takes ten times as long. Sleeping instead costs nothing measurable. Ray's workers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
