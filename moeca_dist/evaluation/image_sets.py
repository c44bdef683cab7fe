"""Sets of images on disk, read a few at a time: output folders, npz files of the ADM kind, folders of pictures.

Shape suffixes: N images, H and W pixels, C channels (1 or 3), F features.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moeca_dist.demo.data import real_digits
from moeca_dist.errors import UserError

REAL_DIGITS = "real-digits"  # where a path is expected: the digits that the demo model learned from
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BLOCK_BYTES = 2**22


class Reader(Protocol):
    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return images start..stop-1 as uint8 [N, H, W, C]. Raises UserError if the file turns out to be damaged."""


@dataclass(frozen=True)
class ImageSet:
    """A description of a set before its images are read.

    - ``num_images`` and ``shape_HWC`` describe the images. A set with ``statistics`` may have no images.
    - ``statistics``: the mean and covariance that ADM's reference files keep of the features of a whole data set.
      ``mu`` and ``sigma`` are those of the pooled features, ``mu_s`` and ``sigma_s`` those of the spatial ones.
    - ``requests``: a description of the images from ``report.json``.
    - ``names``: names of the pictures in a folder.
    """

    path: Path
    num_images: int
    shape_HWC: tuple[int, int, int] | None
    kind: str
    requests: Mapping[str, Any] | None = None
    names: tuple[str, ...] | None = None
    statistics: frozenset[str] = field(default_factory=frozenset)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the images for reading. Every process opens them on its own."""
        if self.kind == "digits":
            yield _InMemory(real_digits())
        elif self.kind == "folder":
            assert self.names is not None and self.shape_HWC is not None
            yield _Pictures(self.path, self.names, self.shape_HWC)
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                yield _Npz(self.path, member)

    def describe(self) -> str:
        if self.shape_HWC is None:
            return f"{self.path} (statistics only)"
        height, width, channels = self.shape_HWC
        return f"{self.path} ({self.num_images:,} images of {height} x {width} x {channels})"


def find_images(path: Path) -> ImageSet:
    """Describe the images at ``path`` without reading them.

    The path is one of these:

    - an output folder of ``moeca generate`` (or its ``uncached`` part) with ``samples.npz`` or ``images/``,
    - an npz file with ``arr_0`` (uint8 [N, H, W, C]),
    - a folder of pictures of one size,
    - ``real-digits``.

    Raises UserError for anything else.
    """
    if str(path) == REAL_DIGITS and not path.exists():
        images_NHWC = real_digits()
        return ImageSet(path, len(images_NHWC), images_NHWC.shape[1:], "digits")
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give an output folder, an npz file or a folder of pictures")
    return _look_into_npz(path)


def _find_in_folder(folder: Path) -> ImageSet:
    requests = _requests_of(folder)
    if (folder / "samples.npz").is_file():
        return _look_into_npz(folder / "samples.npz", requests)
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    names = tuple(sorted(name for name in os.listdir(pictures) if name.lower().endswith(PICTURE_SUFFIXES)))
    if names:
        first = _picture(pictures / names[0])
        return ImageSet(pictures, len(names), first.shape, "folder", requests, names)
    if (folder / "latents.npz").is_file():
        raise UserError(f"{folder} holds latents, not pictures: generate with sampling.vae, or decode them first")
    raise UserError(f"{folder} holds neither samples.npz nor pictures: give an output folder or a folder of pictures")


def _requests_of(folder: Path) -> Mapping[str, Any] | None:
    """Seeds and labels of an output folder; its uncached part has those of the whole."""
    for place in (folder, folder.parent) if folder.name == "uncached" else (folder,):
        try:
            requests = json.loads((place / "report.json").read_text(encoding="utf-8"))["requests"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(requests, dict):
            return requests
    return None


# ---- npz -------------------------------------------------------------------------------------------------------------


def _look_into_npz(path: Path, requests: Mapping[str, Any] | None = None) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            keys = frozenset(name.removesuffix(".npy") for name in archive.namelist())
            statistics = keys & {"mu", "sigma", "mu_s", "sigma_s"}
            if "arr_0" not in keys and {"mu", "sigma"} <= statistics:
                return ImageSet(path, 0, None, "npz", statistics=statistics)
            with archive.open("arr_0.npy") as member:
                shape, dtype = _header(member)
    except KeyError:
        raise UserError(f"{path} has no array arr_0: images are expected there, uint8 [N, H, W, C]") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}; give an npz file with arr_0, uint8 [N, H, W, C]") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(f"arr_0 in {path} is {dtype} {list(shape)}: images are uint8 [N, H, W, 1 or 3]")
    return ImageSet(path, shape[0], (shape[1], shape[2], shape[3]), "npz", requests, statistics=statistics)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the npy header, up to where the values begin."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if fortran_order:
        raise ValueError("arr_0 is stored column by column; save it in C order")
    return shape, dtype


class _Npz:
    """Reads from inside the archive: compressed or not, nothing is unpacked to disk or held as a whole."""

    def __init__(self, path: Path, member: IO[bytes]) -> None:
        self._path, self._member = path, member
        self._shape, _ = _header(member)
        self._begin = member.tell()

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        image_bytes = int(np.prod(self._shape[1:]))
        values = bytearray((stop - start) * image_bytes)
        try:
            self._member.seek(self._begin + start * image_bytes)
            view = memoryview(values)
            while view:
                block = self._member.read(min(len(view), _BLOCK_BYTES))
                if not block:
                    raise EOFError("it ends too early")
                view[: len(block)] = block
                view = view[len(block) :]
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self._path}: {error}; write it again") from None
        return np.frombuffer(values, dtype=np.uint8).reshape(-1, *self._shape[1:])


def read_statistics(images: ImageSet, mean: str, covariance: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read the mean [F] and covariance [F, F] of a reference file.

    Raises UserError if their shapes do not fit together.
    """
    with np.load(images.path, allow_pickle=False) as archive:
        mean_F, covariance_FF = archive[mean].astype(np.float64), archive[covariance].astype(np.float64)
    if mean_F.ndim != 1 or covariance_FF.shape != (len(mean_F), len(mean_F)):
        raise UserError(
            f"{mean} {list(mean_F.shape)} and {covariance} {list(covariance_FF.shape)} in {images.path} are no "
            "mean [F] and covariance [F, F]"
        )
    return mean_F, covariance_FF


# ---- pictures and arrays ---------------------------------------------------------------------------------------------


def _picture(path: Path) -> NDArray[np.uint8]:
    """uint8 [H, W, C]: one channel for grey pictures, three for all others."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; remove or replace it") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


class _Pictures:
    def __init__(self, folder: Path, names: tuple[str, ...], shape_HWC: tuple[int, int, int]) -> None:
        self._folder, self._names, self._shape_HWC = folder, names, shape_HWC

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        pictures = []
        for name in self._names[start:stop]:
            pixels_HWC = _picture(self._folder / name)
            if pixels_HWC.shape != self._shape_HWC:
                raise UserError(
                    f"{self._folder / name} is {list(pixels_HWC.shape)}, {self._names[0]} is {list(self._shape_HWC)}: "
                    "crop and resize all pictures to one size and mode first"
                )
            pictures.append(pixels_HWC)
        return np.stack(pictures)


class _InMemory:
    def __init__(self, images_NHWC: NDArray[np.uint8]) -> None:
        self._images_NHWC = images_NHWC

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self._images_NHWC[start:stop]
