"""The scan of state-space duality (Mamba-2): a linear recurrence with a scalar decay a head."""

from linfusion.kernels.ssd.api import ssd_scan, ssd_step

__all__ = ["ssd_scan", "ssd_step"]
