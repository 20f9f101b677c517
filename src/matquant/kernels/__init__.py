"""Backends for x @ W_r^T. `reference` defines what is correct; every other backend is tested against it."""
