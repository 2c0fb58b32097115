"""GPU kernels in Pallas, and matrix products in the form that each device is fast at."""
