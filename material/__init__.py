"""Models and texts that tests and benchmarks share. Nothing is downloaded, and nothing here knows of Cenote."""
