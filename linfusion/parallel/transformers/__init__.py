"""Transformers whose tokens ranks share: each kind of host, and what its layers need besides."""
