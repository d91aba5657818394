"""Training and evaluation: trainer, hooks, checkpoints, resumable data stream, command logic."""
