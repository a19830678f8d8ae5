"""CLEAR (Liu et al. 2024, arXiv:2412.16112): a window around each token, and the text."""
