"""What surrounds a product, in one pass over memory where eager operators take two to thirteen."""

from linfusion.kernels.elementwise.api import (
    directional_conv,
    gated_rms_norm,
    norm_leaky_relu,
    one_pass,
    rotary_rms_norm,
)

__all__ = [
    "directional_conv",
    "gated_rms_norm",
    "norm_leaky_relu",
    "one_pass",
    "rotary_rms_norm",
]
