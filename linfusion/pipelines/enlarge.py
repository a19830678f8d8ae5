"""Pictures that are enlarged as they are read, so that a large one need never be whole."""

from __future__ import annotations

import numpy as np
from PIL import Image


class Enlarged:
    """A picture at another size, of which runs of rows are computed when they are asked for.

    Pillow's resampling reads beyond a band wherever its filter reaches, so bands meet without a
    seam: they equal the rows of the whole resized picture.

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
        box = (0, start * scale, self._picture.width, min(stop * scale, self._picture.height))
        return np.array(self._picture.resize((width, stop - start), self._resample, box))

    def __len__(self) -> int:
        return self.shape[0]
