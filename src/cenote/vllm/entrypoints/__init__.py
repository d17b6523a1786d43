"""Where servers are started."""
