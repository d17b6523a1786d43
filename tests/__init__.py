"""The tests of Cenote."""

PATIENCE = 300
"""Seconds that a test waits for what must come: a machine that others load takes long, and only a failure so long."""
