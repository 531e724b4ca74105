"""PNAG: a generator trained once, which emits an architecture for any budget; read controller.py first."""
