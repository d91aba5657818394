"""SMCA: spatially modulated co-attention for detection transformers."""
