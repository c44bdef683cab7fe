"""Writing of files that survive a power cut."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk. Its name is durable after ``sync_folder`` of its folder."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
