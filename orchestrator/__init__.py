"""Who decides: controllers, and the run around them."""
import os

# Read when torch is loaded, so set here. Torch's threads spin while they wait for each other; where another process
# wants the core, a step takes ten times as long. Sleeping instead costs nothing measurable. Ray's workers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> object:
    """`from orchestrator import Search, load_config`, loaded when first asked for: Ray is imported late."""
    if name == "Search":
        from orchestrator.run.search import Search

        return Search
    if name == "load_config":
        from orchestrator.config import load_config

        return load_config
    raise AttributeError(f"module 'orchestrator' has no attribute '{name}'")
