"""What users call that joins several rooms: sketch until answers repeat, build an index."""
