"""The files of a batch: durable before they are recorded, checked against the record, assembled at the end.

A chunk's files are written into ``.pending/`` inside the output folder, flushed to the disk and renamed. A writer that
dies in between leaves temporary files only there. The next opening removes them.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moeca_dist.ray_batch.durable import sync_folder, write_durably
from moeca_dist.runtime.output_folder import SampleArray, picture

PENDING = ".pending"
ASSEMBLED = ("samples.npz", "latents.npz", "grid.png", "report.json")


def encode(sample: NDArray[np.generic]) -> bytes:
    """Encode one sample as the content of its file.

    This is PNG for a uint8 picture [H, W, C] and .npy for float32 latents [C, H, W].
    """
    content = io.BytesIO()
    if sample.dtype == np.uint8:
        picture(sample).save(content, format="png")
    else:
        np.save(content, sample)
    return content.getvalue()


def decode(content: bytes) -> NDArray[np.generic]:
    """Return the sample that ``encode`` was given."""
    if content.startswith(b"\x93NUMPY"):
        latents: NDArray[np.generic] = np.load(io.BytesIO(content))
        return latents
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def file_name(index: int, content: bytes) -> str:
    """Return the path of image ``index`` in the output folder."""
    return f"latents/{index:06d}.npy" if content.startswith(b"\x93NUMPY") else f"images/{index:06d}.png"


class Store:
    """The output folder of a batch, for one writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending = folder / PENDING
        shutil.rmtree(self._pending, ignore_errors=True)

    def write(self, contents: Mapping[str, bytes]) -> list[str]:
        """Put files in place and return their SHA-256 in order. They are durable when this returns. Raises OSError."""
        self._pending.mkdir(exist_ok=True)
        try:
            for name, content in contents.items():
                write_durably(self._pending / Path(name).name, content)
            for name in contents:
                target = self.folder / name
                target.parent.mkdir(exist_ok=True)
                (self._pending / target.name).rename(target)
            for parent in {(self.folder / name).parent for name in contents}:
                sync_folder(parent)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(self._pending, ignore_errors=True)
        return [hashlib.sha256(content).hexdigest() for content in contents.values()]

    def problem(self, chunk: Mapping[str, Any]) -> str | None:
        """Return the first fault in the files of a recorded chunk, or None."""
        try:
            for _ in self.samples(chunk):
                pass
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def samples(self, chunk: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the contents of a recorded chunk's files.

        Raises OSError or ValueError if a file is missing or differs from its checksum.
        """
        for name, checksum in zip(chunk["files"], chunk["sha256"], strict=True):
            try:
                content = (self.folder / name).read_bytes()
            except FileNotFoundError:
                raise ValueError(f"{name} is missing") from None
            if hashlib.sha256(content).hexdigest() != checksum:
                raise ValueError(f"{name} differs from its checksum")
            yield content

    def remove_unrecorded(self, first: int, count: int) -> None:
        """Remove files of a chunk that was given up. A commit may have ended between the files and the record."""
        for index in range(first, first + count):
            for name in (f"images/{index:06d}.png", f"latents/{index:06d}.npy"):
                (self.folder / name).unlink(missing_ok=True)

    def remove_assembled(self) -> None:
        """Remove the assembled files of a manifest that is about to grow."""
        for name in ASSEMBLED:
            (self.folder / name).unlink(missing_ok=True)

    def assemble(self, chunks: Iterator[Mapping[str, Any]], num_images: int) -> None:
        """Write the array of all samples and the grid from the recorded chunks, given in order of their images.

        Raises OSError or ValueError if a file is missing or differs from its record.
        """
        self._pending.mkdir(exist_ok=True)
        try:
            array = SampleArray(self._pending, num_images)
            for chunk in chunks:
                array.add(np.stack([decode(content) for content in self.samples(chunk)]))
            array.finish(self._pending)
            self.publish()
        finally:
            shutil.rmtree(self._pending, ignore_errors=True)

    def publish(self, texts: Mapping[str, str] | None = None) -> None:
        """Move all pending files, and ``texts`` by name, into place. They are durable when this returns."""
        self._pending.mkdir(exist_ok=True)
        for name, text in (texts or {}).items():
            (self._pending / name).write_text(text, encoding="utf-8")
        for path in sorted(self._pending.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.rename(self.folder / path.name)
        self._pending.rmdir()
        sync_folder(self.folder)


def encode_all(indices: Sequence[int], samples: NDArray[np.generic]) -> dict[str, bytes]:
    """Return file names and contents of samples in the order of ``indices``."""
    contents = (encode(sample) for sample in samples)
    return {file_name(index, content): content for index, content in zip(indices, contents, strict=True)}
