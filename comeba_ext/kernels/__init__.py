"""The CUDA kernels: how they are compiled, and how they are found."""
