"""Triton kernels. `launch` and `philox` are their foundation; every other file has a family of ops."""
