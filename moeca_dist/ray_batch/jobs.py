"""The requests of a batch: a stream, numbered in order, of which only a chunk is held at a time."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeca_dist.errors import UserError
from moeca_dist.types import Request

INDEX_LIMIT = 2**32  # what sampling.noise can tell apart


class Source(Protocol):
    """A source of requests 0, 1, 2, ... in order, the same at every pass."""

    def __iter__(self) -> Iterator[Request]: ...

    def identity(self) -> dict[str, Any]:
        """Return the identity of the requests as JSON: equal identities mean equal requests."""


@dataclass(frozen=True)
class LabelCycle:
    """A source of ``num_images`` requests whose labels take turns, as in ``moeca generate``."""

    num_images: int
    labels: Sequence[range]
    seed: int

    def __iter__(self) -> Iterator[Request]:
        classes = chain.from_iterable(chain.from_iterable(repeat(self.labels)))
        for index, label in zip(range(self.num_images), classes, strict=False):
            yield Request(index, label, self.seed)

    def identity(self) -> dict[str, Any]:
        labels = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in self.labels)
        return {"labels": labels, "seed": self.seed}


class _Job(BaseModel):
    """One line: ``count`` images of a class."""

    model_config = ConfigDict(extra="forbid")

    label: int = Field(ge=0)
    seed: int = Field(0, ge=0, lt=INDEX_LIMIT)
    count: int = Field(1, ge=1)


@dataclass(frozen=True)
class JobsFile:
    """A file of ``{label, seed, count}``, JSON Lines (``.jsonl``) or CSV with a header (``.csv``).

    ``seed`` (0) and ``count`` (1) may be left out. Empty lines are skipped. Images are numbered through the file.
    """

    path: Path

    def __iter__(self) -> Iterator[Request]:
        index = 0
        for _, job in _jobs(self.path):
            for _ in range(job.count):
                yield Request(index, job.label, job.seed)
                index += 1

    def identity(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            return {"jobs_sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def count_images(self, num_classes: int) -> int:
        """Count the images of the file, reading line by line.

        Raises UserError, naming the line, for a line that is no job of a model with ``num_classes`` classes.
        """
        total = 0
        for line, job in _jobs(self.path):
            if job.label >= num_classes:
                raise _line_error(
                    self.path,
                    line,
                    f"label {job.label} is out of range: this model has {num_classes} classes, 0-{num_classes - 1}",
                )
            total += job.count
            if total > INDEX_LIMIT:
                raise _line_error(self.path, line, f"more than {INDEX_LIMIT} images: split the file")
        if total == 0:
            raise UserError(f"{self.path} holds no jobs: write lines such as {_EXAMPLE}")
        return total


_EXAMPLE = '{"label": 3, "seed": 0, "count": 50}'


def _line_error(path: Path, line: int, problem: str) -> UserError:
    return UserError(f"{path}, line {line}: {problem}")


def _jobs(path: Path) -> Iterator[tuple[int, _Job]]:
    """Jobs with their line numbers, read as they are wanted."""
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path} is neither a .jsonl nor a .csv file: rename it to say which of the two it is")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, record in _csv_records(path, file) if path.suffix == ".csv" else enumerate(file, 1):
                if isinstance(record, str) and not record.strip():
                    continue
                yield line, _parse(path, line, record)
    except OSError as error:
        raise UserError(f"cannot read the jobs file {path}: {error.strerror}; check --jobs") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start} of a block): save it as UTF-8") from None


def _csv_records(path: Path, file: Iterator[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        if "label" not in (reader.fieldnames or ()):
            raise _line_error(path, 1, "the header must name the columns: label,seed,count")
        for record in reader:
            cells = {name: cell for name, cell in record.items() if cell not in (None, "")}
            if None in cells:
                raise _line_error(path, reader.line_num, "more cells than the header has columns")
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise _line_error(path, reader.line_num, f"no CSV: {error}") from None


def _parse(path: Path, line: int, record: str | dict[str, str]) -> _Job:
    try:
        if isinstance(record, str):
            return _Job.model_validate_json(record, strict=True)
        return _Job.model_validate_strings(record)
    except ValidationError as error:
        problems = []
        for details in error.errors():
            key = ".".join(str(part) for part in details["loc"])
            problem = details["msg"].replace("Input should be", "must be").replace("Extra inputs are not", "is not")
            problems.append(f"{key}: {problem}" if key else f"{problem}; write lines such as {_EXAMPLE}")
        raise _line_error(path, line, "; ".join(problems)) from None
