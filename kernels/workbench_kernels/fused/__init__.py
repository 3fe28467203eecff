"""Triton twins: one file per op, imported inside the op's function and never on import of the package."""
