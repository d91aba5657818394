"""The operators' CUDA kernels, written in Triton: one file per operator."""
