"""Questions to an index and their answers."""
