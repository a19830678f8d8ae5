"""Both directions of the scan over the same tokens, keys and queries, as one operator."""

from linfusion.kernels.ssd.bidirectional.api import ssd_bidirectional

__all__ = ["ssd_bidirectional"]
