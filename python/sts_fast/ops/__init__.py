"""The native ops where the rows are: on the CPU, on a CUDA device, or inside of compiled torch code."""
