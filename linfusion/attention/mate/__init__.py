"""LinGen's MATE (Wang et al. 2024): Mamba-2 in both directions beside windows in time and space."""
