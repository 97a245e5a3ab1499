"""Kernels in CUDA C++ for compute capabilities 7.0 and 7.5, compiled by NVRTC where they run."""
