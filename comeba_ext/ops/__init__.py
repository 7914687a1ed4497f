"""Numerical operations, one a file. They know tensors, not models."""
