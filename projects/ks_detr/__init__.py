"""KS-DETR: knowledge sharing in attention learning for detection transformers."""
