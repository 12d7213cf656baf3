"""Benchmarks: what a search costs, how good its fronts are, how fast the store, the kernels and training are."""
