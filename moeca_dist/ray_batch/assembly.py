"""Assembly of a finished batch from its manifest: the array of all samples, the grid and the report.

Images are streamed and never held.
"""

import statistics
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeca_dist.config import Config
from moeca_dist.ray_batch.ledger import Plan
from moeca_dist.ray_batch.manifest import MANIFEST, read_records_at, unseal
from moeca_dist.ray_batch.store import Store
from moeca_dist.report.merge import ReportTotal
from moeca_dist.report.schema import Report, describe_requests

_ABSENT = -1


@dataclass
class History:
    """The events of a batch over all its runs, read from the manifest."""

    plan: Plan
    offsets: "array[int]"
    quarantined: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    rebuilt: list[Mapping[str, Any]] = field(default_factory=list)
    retries: int = 0
    voided: int = 0
    runs: int = 0
    wall_s: float = 0.0
    _run_began: float = 0.0
    _run_ended: float = 0.0

    @classmethod
    def read(cls, plan: Plan) -> "History":
        """Read the manifest once, keeping eight bytes for each chunk."""
        history = cls(plan, array("q", [_ABSENT]) * plan.num_chunks)
        for offset, record in read_records_at(plan.folder / MANIFEST):
            history._note(offset, record)
        history.wall_s += history._run_ended - history._run_began
        return history

    def _note(self, offset: int, record: Mapping[str, Any]) -> None:
        match record["kind"]:
            case "run":
                if self.runs:
                    self.wall_s += self._run_ended - self._run_began
                self._run_began = record["time"]
                self.runs += 1
                self.quarantined.clear()
            case "chunk":
                self.offsets[record["chunk"]] = offset
                self.quarantined.pop(record["chunk"], None)
            case "void":
                self.offsets[record["chunk"]] = _ABSENT
                self.voided += 1
            case "failed" if record["quarantined"]:
                self.quarantined[record["chunk"]] = record
            case "failed":
                self.retries += 1
            case "rebuilt":
                self.rebuilt.append(record)
        self._run_ended = record["time"]

    def chunks(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records of all chunks in order of their images."""
        with (self.plan.folder / MANIFEST).open("rb") as file:
            for offset in self.offsets:
                if offset != _ABSENT:
                    file.seek(offset)
                    record = unseal(file.readline())
                    if record is None:
                        raise ValueError(f"the record at byte {offset} of {MANIFEST} is damaged")
                    yield record

    def is_done(self, index: int) -> bool:
        """Return whether image ``index`` is recorded."""
        return self.offsets[index // self.plan.chunk_size] != _ABSENT

    def facts(self, gangs: int, gang_size: int) -> dict[str, Any]:
        """Return the ``batch`` section of the report."""
        seconds = [record["seconds"] for record in self.rebuilt]
        return {
            "gangs": gangs,
            "gang_size": gang_size,
            "chunks": self.plan.num_chunks,
            "chunk_size": self.plan.chunk_size,
            "runs": self.runs,
            "retries": self.retries,
            "damaged_chunks": self.voided,
            "quarantined": [
                {name: record[name] for name in ("chunk", "first", "count", "problem")}
                for _, record in sorted(self.quarantined.items())
            ],
            "rebuilt": {
                "count": len(seconds),
                "median_s": statistics.median(seconds) if seconds else None,
                "worst_s": max(seconds, default=None),
            },
        }


def assemble(plan: Plan, config: Config, gangs: int, gang_size: int) -> Report | None:
    """Write ``samples.npz`` (or ``latents.npz``), ``grid.png``, ``config.yaml`` and ``report.json``.

    Chunks that were given up are missing. Raises ValueError or OSError if a file is missing or differs from its
    checksum. Then nothing assembled appears.

    Returns:
        The report, or None if there is no image at all.
    """
    history, total, num_images = History.read(plan), ReportTotal(), 0
    for record in history.chunks():
        total.add(record["report"])
        num_images += record["count"]
    requests = describe_requests(request for request in plan.source if history.is_done(request.index))
    report = total.result(history.wall_s, history.facts(gangs, gang_size), requests)
    if report is None:
        return None
    store = Store(plan.folder)
    store.assemble(history.chunks(), num_images)
    store.publish({"config.yaml": config.to_yaml(), "report.json": report.to_json()})
    return report
