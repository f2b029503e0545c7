"""Rules, one file per kind of layer; importing a file registers them."""
