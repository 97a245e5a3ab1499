"""What was measured of kernels, and kept."""
