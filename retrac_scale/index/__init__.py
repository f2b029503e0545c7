"""A store seen by one estimator, laid out for scanning: built, read, scanned."""
