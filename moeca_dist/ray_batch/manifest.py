"""The record of a batch: an append-only file of JSON lines, each with a checksum of itself.

The first line describes the batch (``kind: job``). Later lines win over earlier ones. Their kinds are:

- ``run``: a start of the driver.
- ``chunk``: images that are durable, with the SHA-256 of every file.
- ``failed``: a failed try, with ``quarantined`` for the last.
- ``void``: a recorded chunk whose files were found damaged.
- ``rebuilt``: a gang that was formed anew.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from moeca_dist.errors import UserError
from moeca_dist.ray_batch.durable import sync_folder

MANIFEST = "manifest.jsonl"
VERSION = 1


def seal(record: Mapping[str, Any]) -> bytes:
    """Return one line of the file: the record with the CRC-32 of its canonical JSON."""
    body = _canonical(record)
    return f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}\n'.encode()


def unseal(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None for a line that is incomplete or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        checksum = record.pop("crc")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return record if zlib.crc32(_canonical(record).encode()) == checksum else None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records up to the first damaged line."""
    with path.open("rb") as file:
        for _, record in _good_lines(file):
            yield record


def read_records_at(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records up to the first damaged line, with the offset at which each line begins."""
    begin = 0
    with path.open("rb") as file:
        for end, record in _good_lines(file):
            yield begin, record
            begin = end


def _good_lines(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the offset at which its line ends."""
    end = 0
    for line in file:
        record = unseal(line)
        if record is None:
            return
        end += len(line)
        yield end, record


def _canonical(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return the first record of the batch in ``folder``.

    It is None if there is no manifest, or none with a complete first line. Raises UserError for a manifest of another
    version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    first = next(read_records(path), None)
    if first is not None and (first.get("kind") != "job" or first.get("version") != VERSION):
        raise UserError(f"{path} is no manifest of this version: finish the batch with the version that began it")
    return first


class Manifest:
    """The manifest, open for appending by one process at a time."""

    def __init__(self, folder: Path, lock_timeout_s: float) -> None:
        """Open or create the manifest, and cut off everything after the last good record.

        ``repair`` describes such a cut. Raises UserError if another process holds the manifest for longer than
        ``lock_timeout_s``.
        """
        self.path = folder / MANIFEST
        # Unbuffered: a record is in the kernel's hands when append returns, or not at all.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        self._lock(lock_timeout_s)
        sync_folder(folder)
        self.repair = self._repair()

    def append(self, kind: str, **content: Any) -> None:
        """Add a record. It is durable when this returns. Raises OSError (a full disk), and then has added nothing."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            line = seal({"kind": kind, "time": round(time.time(), 3)} | content)
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise

    def close(self) -> None:
        self._file.close()

    def _lock(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # The supervisor of a run that was killed may live for some seconds yet.
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another run is writing to {self.path.parent}: wait for it, or choose another --out"
                    ) from None
                time.sleep(0.2)

    def _repair(self) -> str | None:
        self._file.seek(0)
        lines = end = 0
        for end, _ in _good_lines(self._file):  # noqa: B007
            lines += 1
        damaged = os.fstat(self._file.fileno()).st_size - end
        if not damaged:
            return None
        os.ftruncate(self._file.fileno(), end)
        os.fsync(self._file.fileno())
        return f"{self.path}: line {lines + 1} is damaged; going on from the {lines} good records before it"
