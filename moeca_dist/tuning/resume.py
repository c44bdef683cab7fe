"""What a tuning run has found so far, beside its output: append-only, so that a killed run goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from moeca_dist.errors import UserError


class StateFile:
    """JSON lines; the first says which run they belong to. Rank 0 alone has one."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """Open the file for more; ``records`` holds what an earlier run of the same settings left.

        Raises UserError where it belongs to other settings or cannot be written.
        """
        self.path = path
        header = json.dumps({"run": run}, sort_keys=True)
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            self._file: TextIO = path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        # The line that was being written when the run was killed has no end.
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0].strip() != header:
            raise UserError(
                f"{path} belongs to a run with other settings: go on with those, or remove it to start anew"
            )
        self.records = _parsed(whole[1:], path)
        self._file.truncate(sum(len(line.encode()) for line in whole))
        if not whole:
            self._write(header)

    def add(self, record: dict[str, Any]) -> None:
        self._write(json.dumps(record))

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(lines: list[str], path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{path} is damaged: remove it to start anew") from None
