"""IO processors."""
