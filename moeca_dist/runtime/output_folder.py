"""The output folder: written beside its final place and renamed when everything is in it.

    OUT/
    |-- images/000000.png ...    pictures
    |-- grid.png                 the first pictures at a glance
    |-- samples.npz              ``arr_0``, uint8 [N, H, W, C], the field's FID input
    |-- config.yaml
    |-- report.json
    |-- uncached/                the exact samples of a compared run
    |-- comparison.png           both grids of a compared run
    `-- traces/rank_000.json.gz  of a profiled run

For latents without a decoder ``latents.npz`` (``arr_0``, float32 [N, C, H, W]) takes the place of the pictures.
"""

import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.evaluation.paired import PairedQuality, unit_images
from moeca_dist.report.schema import Report
from moeca_dist.types import Request

GRID_LIMIT = 100
GRID_TILE = 64
COMPARE_CHUNK = 64  # images held in memory at a time


class SampleArray:
    """The samples of a run in one file-backed array: 50,000 pictures would not fit in memory beside the model."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self._mapped = folder / "arr_0.npy"
        self._num_images = num_images
        self._written = 0
        self.samples: NDArray[np.generic] | None = None

    def add(self, samples: NDArray[np.generic]) -> None:
        """Append samples: uint8 pictures [n, H, W, C], or float32 latents [n, C, H, W]."""
        if self.samples is None:
            self.samples = np.lib.format.open_memmap(
                self._mapped, mode="w+", dtype=samples.dtype, shape=(self._num_images, *samples.shape[1:])
            )
        self.samples[self._written : self._written + len(samples)] = samples
        self._written += len(samples)

    def grid(self) -> Image.Image | None:
        """Return the first pictures at a glance, or None if the samples are latents."""
        assert self.samples is not None
        return _grid(self.samples[:GRID_LIMIT]) if self.samples.dtype == np.uint8 else None

    def finish(self, folder: Path) -> None:
        """Write ``samples.npz`` and ``grid.png``, or ``latents.npz``, into ``folder``, and delete the array."""
        assert self.samples is not None and self._written == self._num_images
        grid = self.grid()
        if grid is not None:
            grid.save(folder / "grid.png")
        self.samples = None  # flushes the mapped file
        with zipfile.ZipFile(folder / ("samples.npz" if grid is not None else "latents.npz"), "w") as archive:
            archive.write(self._mapped, "arr_0.npy")
        self._mapped.unlink()


class SampleWriter:
    """A writer of the samples of one generation into a folder: pictures one by one, the array at the end."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._array = SampleArray(folder, num_images)

    @property
    def samples(self) -> NDArray[np.generic] | None:
        return self._array.samples

    def add(self, requests: Sequence[Request], samples: NDArray[np.generic]) -> None:
        """Append samples: uint8 pictures [n, H, W, C], or float32 latents [n, C, H, W]."""
        self._array.add(samples)
        if samples.dtype == np.uint8:
            folder = self._folder / "images"
            folder.mkdir(exist_ok=True)
            for request, pixels_HWC in zip(requests, samples, strict=True):
                picture(pixels_HWC).save(folder / f"{request.index:06d}.png")

    def grid(self) -> Image.Image | None:
        """Return the first pictures at a glance, or None if the samples are latents."""
        return self._array.grid()

    def finish(self) -> None:
        """Write the whole array, and the grid of pictures."""
        self._array.finish(self._folder)


class OutputFolder:
    """The output folder of a run on rank 0. Nothing appears at ``path`` before ``finish``."""

    def __init__(
        self, path: str | os.PathLike[str], num_images: int, *, overwrite: bool = False, compare: bool = False
    ) -> None:
        """Check the place and open a partial folder beside it.

        Raises UserError for a non-empty folder without ``overwrite``, and for a place that cannot be written.

        Args:
            compare: whether the folder also takes uncached samples.
        """
        self.path = Path(os.path.abspath(path))
        _refuse_occupied(self.path, overwrite)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            # A run that was killed leaves its partial folder; the next run into the same place replaces it.
            shutil.rmtree(self._partial, ignore_errors=True)
            self._samples = SampleWriter(self._partial, num_images)
            self._uncached = SampleWriter(self._partial / "uncached", num_images) if compare else None
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path.parent}: {error.strerror}; choose another output folder with --out"
            ) from None

    def add(self, requests: Sequence[Request], samples: NDArray[np.generic]) -> None:
        """Append samples of the run."""
        self._samples.add(requests, samples)

    def add_uncached(self, requests: Sequence[Request], samples: NDArray[np.generic]) -> None:
        """Append samples of the exact run with the same requests."""
        assert self._uncached is not None
        self._uncached.add(requests, samples)

    def add_trace(self, rank: int, trace: bytes) -> None:
        """Keep one rank's profile: gzipped JSON."""
        folder = self._partial / "traces"
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{rank:03d}.json.gz").write_bytes(trace)

    def quality(self) -> dict[str, float] | None:
        """Compare the samples with the uncached ones.

        Returns:
            Paired metrics by name. None if there are no uncached samples, and for latents.
        """
        if self._uncached is None:
            return None
        found, exact = self._samples.samples, self._uncached.samples
        assert found is not None and exact is not None
        if found.dtype != np.uint8:
            return None
        paired = PairedQuality()
        for start in range(0, len(found), COMPARE_CHUNK):
            chunk = slice(start, start + COMPARE_CHUNK)
            paired.add(unit_images(np.array(found[chunk])), unit_images(np.array(exact[chunk])))
        result = paired.result()
        return {"psnr_db": result.psnr_db, "rel_l2": result.rel_l2, "ssim": result.ssim}

    def add_file(self, name: str, text: str) -> Path:
        """Put a text file beside the samples. Returns its final path."""
        (self._partial / name).write_text(text, encoding="utf-8")
        return self.path / name

    def finish(self, config: Config, report: Report) -> None:
        """Write the rest and move the folder into place, replacing an older one as a whole."""
        if self._uncached is not None:
            sheets = self._uncached.grid(), self._samples.grid()
            if sheets[0] is not None and sheets[1] is not None:
                _side_by_side(sheets[0], sheets[1]).save(self._partial / "comparison.png")
            self._uncached.finish()
        self._samples.finish()
        (self._partial / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (self._partial / "report.json").write_text(report.to_json(), encoding="utf-8")
        self._swap()

    def abandon(self) -> None:
        """Remove the partial folder. Whatever stood at ``path`` stays as it was."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _swap(self) -> None:
        if not self.path.exists():
            self._partial.rename(self.path)
            return
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        self.path.rename(replaced)
        self._partial.rename(self.path)
        shutil.rmtree(replaced)


def _refuse_occupied(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"the output folder {path} is a file: choose another place with --out")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"the output folder {path} is not empty: choose another one, or pass --overwrite to replace it")
    if not (path / "report.json").is_file():
        # Replacing removes the whole folder: a mistyped --out must not cost somebody's home.
        raise UserError(f"the output folder {path} holds something else than an earlier run: choose another with --out")


def picture(pixels_HWC: NDArray[np.generic]) -> Image.Image:
    """Return a picture of uint8 [H, W, C] with one or three channels."""
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def _grid(pictures_NHWC: NDArray[np.generic]) -> Image.Image:
    """Put pictures in rows of ten, or fewer if there are fewer. Small ones are enlarged by whole factors."""
    count, height, width, channels = pictures_NHWC.shape
    columns = min(10, count)
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    canvas[:count] = pictures_NHWC
    sheet = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    image = picture(sheet.reshape(rows * height, columns * width, channels))
    zoom = max(1, GRID_TILE // height)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put the uncached pictures left and the cached ones right, with a grey bar between."""
    bar = 8
    sheet = Image.new(left.mode, (left.width + bar + right.width, left.height), 128 if left.mode == "L" else "grey")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + bar, 0))
    return sheet
