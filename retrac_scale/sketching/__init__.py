"""From a dataset to the blocks of a store."""
