"""The scan of state-space duality (Mamba-2): a linear recurrence with a scalar decay a head."""

from linfusion.kernels.ssd.api import ssd_scan, ssd_step
from linfusion.kernels.ssd.bidirectional import ssd_bidirectional

__all__ = ["ssd_bidirectional", "ssd_scan", "ssd_step"]
