"""The operators' CUDA kernels, written in Triton; each operator's module has its name."""
