"""How far an answer can be trusted: what the measurements of one store say of another run."""
