"""Pictures that are enlarged as they are read, so that a large one need never be whole."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


class Enlarged:
    """A picture at another size, of which runs of rows are computed when they are asked for.

    A band reads the rows beyond it that Pillow's filter reaches, so bands meet without a seam: they
    are the rows of the whole picture resized across, then down.

    Args:
        picture: uint8 [h, w, 3].
        height, width: of the result.
        resample: of `PIL.Image.Resampling`.

    Attributes:
        shape: (height, width, 3); with `ndim` and `dtype` it stands for the array.
    """

    def __init__(
        self,
        picture: np.ndarray,
        height: int,
        width: int,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        self._picture = Image.fromarray(picture)
        self._resample = resample
        self.shape, self.ndim, self.dtype = (height, width, 3), 3, np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """uint8 [rows, width, 3]."""
        height, width, _ = self.shape
        start, stop, _ = rows.indices(height)
        scale = self._picture.height / height
        reach = math.ceil(3 * max(scale, 1.0)) + 1  # of the widest of Pillow's filters
        top = max(0, math.floor(start * scale) - reach)
        bottom = min(self._picture.height, math.ceil(stop * scale) + reach)
        # Across first, then down: by itself Pillow takes the order that is cheaper for a band, and
        # what is rounded between the two passes differs.
        source = self._picture.crop((0, top, self._picture.width, bottom))
        source = source.resize((width, bottom - top), self._resample)
        ends = start * scale - top, min(stop * scale - top, bottom - top)
        box = (0, ends[0], width, ends[1])
        return np.array(source.resize((width, stop - start), self._resample, box))

    def __len__(self) -> int:
        return self.shape[0]
