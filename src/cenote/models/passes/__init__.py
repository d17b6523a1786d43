"""Changes of a loaded model, one file each. `table` has them in their order."""
