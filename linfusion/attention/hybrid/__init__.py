"""Softmax near and a summary of the rest, in one normalisation; for any host, without training."""
