"""Benchmarks: each prints ratios against a rival measured beside it in one process."""
