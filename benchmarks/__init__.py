"""Benchmarks; a package of its own name, because opacus installs one that is called the same."""
