"""LinFusion (Liu et al. 2024, arXiv:2409.02097): normalised linear attention for UNets."""
