"""Mamba-2 (Dao and Gu 2024), causal and in both directions."""
