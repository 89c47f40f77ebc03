"""Numba loops. `cache`, `memory`, `sums`, `threads` and `philox` are the foundation; every other file has a family of ops."""
