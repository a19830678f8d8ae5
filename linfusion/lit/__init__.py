"""LiT's whole models: inherited weights, the authors' checkpoints, and their pipeline."""
