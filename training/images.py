"""Where training images come from.

Whatever the source, the result is one `Images`: uint8 pixels in memory, integer labels, a held-out
split. Floats in [-1, 1] exist only a batch at a time.
"""

from __future__ import annotations

import hashlib
import importlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Source = Literal["digits", "npz", "folder", "huggingface"]
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

HELD_OUT = 0.2  # of a source without a split of its own
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """The data cannot be used; the message names the file and what was expected of it."""


@dataclass(frozen=True, slots=True)
class Images:
    """A labelled set of images and its held-out part."""

    pixels: Pixels  # [N, C, H, W]
    labels: Labels  # [N], from 0
    held_out_pixels: Pixels  # [M, C, H, W]
    held_out_labels: Labels  # [M]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for pixels, labels in ((self.pixels, self.labels), (self.held_out_pixels, self.held_out_labels)):
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
                raise DataError(f"pixels are {pixels.dtype} {list(pixels.shape)}, not uint8 [N, 1 or 3, H, W]")
            if len(pixels) == 0:
                raise DataError("no images")
            if labels.shape != (len(pixels),):
                raise DataError(f"{len(pixels)} images have labels of shape {list(labels.shape)}")
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise DataError(
                    f"labels run from {labels.min()} to {labels.max()}, "
                    f"and there are {len(self.class_names)} classes, counted from 0"
                )
        if self.pixels.shape[1:] != self.held_out_pixels.shape[1:]:
            raise DataError(
                f"images are {list(self.pixels.shape[1:])}, held-out ones {list(self.held_out_pixels.shape[1:])}"
            )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``[C, H, W]`` of one image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def sha256(self) -> str:
        """Of the training images and their labels."""
        return hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()

    def sigma_data(self) -> float:
        """Standard deviation of the training pixels in [-1, 1]; what EDM calls sigma_data."""
        deviation = float(self.pixels[:10_000].std() / 127.5)
        if deviation < 0.001:
            raise DataError("all pixels are alike: there is nothing to learn")
        return deviation


def to_float(pixels: Pixels) -> Tensor:
    """Uint8 pixels as float32 in [-1, 1], same shape."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def load_images(source: Source, path: str | Path | None, class_names: Sequence[str] = ()) -> Images:
    """Read a data set.

    Args:
        source: ``digits`` (scikit-learn's, no path), ``npz`` (x_train, y_train, x_test, y_test), ``folder``
            (one folder a class) or ``huggingface`` (a data set's name, or a folder of ``save_to_disk``).
        path: where it is; relative to the working directory.
        class_names: names of the classes in order; taken from the source, or numbers, if empty.

    Raises:
        DataError: it is missing or is not what was expected.
    """
    if source == "digits":
        if path is not None:
            raise DataError(f"{path}: data source 'digits' comes with scikit-learn and is read from no file")
        return _digits()
    if path is None:
        raise DataError(f"data source {source!r} needs a path")
    if source == "huggingface":
        return _huggingface(str(path), class_names)
    if not Path(path).exists():
        raise DataError(f"{path}: no such {'file' if source == 'npz' else 'folder'}")
    try:
        return _npz(Path(path), class_names) if source == "npz" else _folder(Path(path))
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _digits() -> Images:
    """Scikit-learn's 1797 handwritten digits, 8 x 8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data source 'digits' needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    pixels = np.round(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    return _split(pixels, bunch.target.astype(np.int64), tuple(map(str, range(10))), held_out=500)


def _npz(path: Path, class_names: Sequence[str]) -> Images:
    """Keras' layout: x_train, y_train, x_test, y_test; images ``[N, H, W]`` or ``[N, H, W, 3]``."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in file]
            if missing:
                raise DataError(f"no array {missing[0]!r}; it has {', '.join(sorted(file)) or 'none'}")
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"not a readable .npz file ({error})") from None
    for key, array in zip(("x_train", "x_test"), (arrays[0], arrays[2]), strict=True):
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise DataError(f"{key} is {array.dtype} {list(array.shape)}, not uint8 [N, H, W] or [N, H, W, 3]")
    x_train, x_test = (_channels_first(array) for array in (arrays[0], arrays[2]))
    for key, array in zip(("y_train", "y_test"), (arrays[1], arrays[3]), strict=True):
        if array.dtype.kind not in "iu":
            raise DataError(f"{key} is {array.dtype}, not whole numbers")
    y_train, y_test = (array.reshape(-1).astype(np.int64) for array in (arrays[1], arrays[3]))
    names = tuple(class_names) or tuple(map(str, range(int(y_train.max(initial=0)) + 1)))
    return Images(x_train, y_train, x_test, y_test, names)


def _folder(path: Path) -> Images:
    """One folder a class; every image the size of the first."""
    if not path.is_dir():
        raise DataError("not a folder; expected one that holds one folder a class")
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    if not folders:
        raise DataError("no folders inside; expected one folder a class")
    pixels: list[Pixels] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            try:
                with Image.open(file) as image:
                    array = np.asarray(image.convert("L" if image.mode in ("L", "1", "LA") else "RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # Pillow's, by format
                raise DataError(f"{file}: not a readable image") from None
            if pixels and array.shape != pixels[0].shape:
                raise DataError(f"{file}: is {list(array.shape)}, the first image is {list(pixels[0].shape)}")
            pixels.append(array)
            labels.append(label)
    names = tuple(folder.name for folder in folders)
    return _split(_channels_first(np.stack(pixels)), np.array(labels, np.int64), names)


def _huggingface(name: str, class_names: Sequence[str]) -> Images:
    """A data set with an image and a label column, by name or from ``save_to_disk``."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError("data source 'huggingface' needs datasets: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in splits:
        raise DataError(f"{name}: no split 'train'; it has {', '.join(splits)}")
    train = splits["train"]
    image_key = _column(name, train, ("image", "img"))
    label_key = _column(name, train, ("label", "labels", "fine_label"))
    names = tuple(class_names) or tuple(getattr(train.features[label_key], "names", ()))
    pixels, labels = _rows(name, train, image_key, label_key)
    names = names or tuple(map(str, range(int(labels.max()) + 1)))
    test = splits.get("test", splits.get("validation"))
    if test is None:
        return _split(pixels, labels, names)
    return Images(pixels, labels, *_rows(name, test, image_key, label_key), names)


def _column(name: str, split: Any, candidates: tuple[str, ...]) -> str:
    for candidate in candidates:
        if candidate in split.column_names:
            return candidate
    raise DataError(f"{name}: no column {' or '.join(candidates)}; it has {', '.join(split.column_names)}")


def _rows(name: str, split: Any, image_key: str, label_key: str) -> tuple[Pixels, Labels]:
    gray = split[0][image_key].mode in ("L", "1", "LA")
    arrays = [np.asarray(row[image_key].convert("L" if gray else "RGB")) for row in split]
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1:
        raise DataError(f"{name}: images are of {len(sizes)} sizes, for example {sorted(sizes)[:2]}")
    return _channels_first(np.stack(arrays)), np.array(split[label_key], np.int64)


def _channels_first(array: Pixels) -> Pixels:
    """``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``."""
    return np.ascontiguousarray(array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2))


def _split(pixels: Pixels, labels: Labels, names: tuple[str, ...], held_out: int | None = None) -> Images:
    """Hold out a fixed random part of a set without a split of its own."""
    count = held_out or max(1, round(HELD_OUT * len(pixels)))
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train = order[:count], order[count:]
    return Images(pixels[train], labels[train], pixels[test], labels[test], names)
