"""Cenote beside its peers: one row of `table.py` each, an environment of its own, the same texts, taking turns."""
