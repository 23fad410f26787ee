"""Benchmarks of the scripts; `make bench` runs them."""
