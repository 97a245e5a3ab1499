"""Kernels in CUDA C++ for compute capability 7.0 and 7.5."""
