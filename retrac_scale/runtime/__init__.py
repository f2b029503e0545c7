"""Tasks run here or on Dask workers."""
