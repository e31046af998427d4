"""Pictures of samples: single image files, and labelled grids for people to look at."""

import io
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

ImageFormat = Literal["png", "jpeg", "webp"]
Pixels = NDArray[np.uint8]

_STORED = 4096  # bytes of pixels up to which a PNG holds them as they are: to deflate them costs more than to send them
_GAP = 2  # between the images of a grid, in pixels of the result
_LABEL_WIDTH = 104


def encode(pixels: Pixels, image_format: ImageFormat = "png") -> bytes:
    """One image as a file.

    Args:
        pixels: ``[height, width, 1 or 3]`` uint8.
        image_format: PNG is lossless; JPEG and WebP are written with quality 95.
    """
    if image_format == "png":
        return _png(pixels)
    file = io.BytesIO()
    _image(pixels).save(file, image_format.upper(), quality=95)
    return file.getvalue()


def _png(pixels: Pixels) -> bytes:
    """A PNG file, unfiltered: the PNG specification, section 5."""
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each line begins with its filter, none
    lines[:, 1:] = pixels.reshape(height, -1)
    data = _stored(lines.tobytes()) if lines.size <= _STORED else zlib.compress(lines.data, 1)
    return b"".join((_png_head(width, height, channels), *_chunk(b"IDAT", data), _PNG_END))


@lru_cache(maxsize=64)
def _png_head(width: int, height: int, channels: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"".join((b"\x89PNG\r\n\x1a\n", *_chunk(b"IHDR", header)))


def _chunk(kind: bytes, data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


_PNG_END = b"".join(_chunk(b"IEND", b""))


def _stored(data: bytes) -> bytes:
    """A zlib stream of one stored block (RFC 1950, RFC 1951): what ``zlib.compress(data, 0)`` gives."""
    return b"".join(
        (
            b"\x78\x01\x01",
            struct.pack("<HH", len(data), len(data) ^ 0xFFFF),
            data,
            struct.pack(">I", zlib.adler32(data)),
        )
    )


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
