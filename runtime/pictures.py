"""Pictures of samples: single image files, and labelled grids for people to look at."""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

ImageFormat = Literal["png", "jpeg", "webp"]
Pixels = NDArray[np.uint8]

_GAP = 2  # between the images of a grid, in pixels of the result
_LABEL_WIDTH = 104


def encode(pixels: Pixels, image_format: ImageFormat = "png") -> bytes:
    """One image as a file.

    Args:
        pixels: ``[height, width, 1 or 3]`` uint8.
        image_format: PNG is lossless and fast here: level 1, since higher ones take longer and save little.
    """
    options: dict[str, Any] = {"compress_level": 1} if image_format == "png" else {"quality": 95}
    file = io.BytesIO()
    _image(pixels).save(file, image_format.upper(), **options)
    return file.getvalue()


def grid(rows: Sequence[Sequence[Pixels]], labels: Sequence[str] = (), scale: int = 2) -> Image.Image:
    """Images in rows, each row with its label in front.

    Args:
        rows: images ``[height, width, 1 or 3]`` uint8, all of one shape.
        labels: one for each row, or none.
        scale: pixels of the result for one pixel of an image.
    """
    height, width = rows[0][0].shape[0] * scale, rows[0][0].shape[1] * scale
    left = _LABEL_WIDTH if labels else 0
    columns = max(len(row) for row in rows)
    size = (left + columns * (width + _GAP), len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (height + _GAP)
        if labels:
            draw.text((8, top + height // 2), labels[i], (228, 228, 231), ImageFont.load_default(14), anchor="lm")
        for j, pixels in enumerate(row):
            image = _image(pixels).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + j * (width + _GAP), top))
    return sheet


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
