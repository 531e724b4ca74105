"""report.html: one self-contained page about a run (page.py), drawn from its folder (data.py)."""
