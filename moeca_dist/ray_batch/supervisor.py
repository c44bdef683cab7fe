"""The one writer of a batch: it gives out chunks of requests, makes their images durable and records them.

It holds the chunks in flight and one byte per chunk, never the requests themselves. Its lasting state is in the
manifest, so Ray may restart it at any time. Leases are not in the manifest: the driver names the chunks in flight with
every call.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import ray

from moeca_dist.errors import UserError
from moeca_dist.ray_batch.ledger import Ledger, Plan
from moeca_dist.ray_batch.manifest import VERSION, read_records
from moeca_dist.ray_batch.metrics import JobMetrics
from moeca_dist.types import Request


@dataclass(frozen=True)
class Chunk:
    """Requests that a gang generates together."""

    id: int
    requests: Sequence[Request]


@dataclass(frozen=True)
class Status:
    """Counts of the whole job, earlier runs included. ``remaining`` chunks are neither recorded nor given up."""

    images: int
    remaining: int
    quarantined: int
    retries: int


class Supervisor:
    """A Ray actor. Calls are cheap except ``commit``, ``verify`` and ``begin``, which have a thread of their own."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._opened: Ledger | None = None
        self._metrics = JobMetrics()
        self._retry: deque[Chunk] = deque()

    @ray.method(concurrency_group="files")
    def begin(self, **run: Any) -> str | None:
        """Open the manifest for a new run. Returns a description of its repair, or None.

        Raises UserError if another run holds the folder.
        """
        ledger = self._ledger
        if ledger.empty:
            ledger.manifest.append("job", version=VERSION, identity=self._plan.identity)
        ledger.manifest.append("run", **run)
        ledger.forget_failures()
        return ledger.manifest.repair

    @ray.method(concurrency_group="files")
    def verify(self) -> list[str]:
        """Check every recorded file against its checksum, and return the faults.

        Chunks with a fault are generated anew.
        """
        ledger, problems = self._ledger, []
        for record in read_records(ledger.manifest.path):
            if record["kind"] == "chunk" and ledger.done[record["chunk"]]:
                problem = ledger.store.problem(record)
                if problem is not None:
                    problems.append(problem)
                    ledger.manifest.append("void", chunk=record["chunk"], problem=problem)
                    ledger.void(record["chunk"])
        if ledger.remaining:
            ledger.store.remove_assembled()
        return problems

    def lease(self, in_flight: frozenset[int]) -> Chunk | None:
        """Return the next chunk that nobody works on, failed ones last, or None if there is none at present."""
        with self._lock:
            chunk = self._next_fresh(in_flight)
            if chunk is None and self._retry:
                chunk = self._retry.popleft()
            return chunk

    @ray.method(concurrency_group="files")
    def commit(self, chunk: int, contents: Mapping[str, bytes], gang: int, report: Mapping[str, Any]) -> bool:
        """Make a chunk's files durable, then record the chunk. Returns False if it was recorded before.

        Raises OSError if the disk is full. Then the chunk is not recorded.
        """
        ledger = self._ledger
        first, count = self._plan.extent(chunk)
        if ledger.done[chunk]:
            return False
        if len(contents) != count:
            raise ValueError(f"chunk {chunk} has {len(contents)} images where {count} were asked for")
        checksums = ledger.store.write(contents)
        ledger.manifest.append(
            "chunk",
            chunk=chunk,
            first=first,
            count=count,
            files=list(contents),
            sha256=checksums,
            gang=gang,
            report=report,
        )
        with self._lock:
            ledger.complete(chunk)
        self._metrics.count_images(count)
        return True

    @ray.method(concurrency_group="files")
    def fail(self, chunk: Chunk, problem: str, counts: bool) -> bool:
        """Take a chunk back after a failed try, and return whether it is given up.

        Args:
            counts: whether the chunk may be to blame. It is not if a node was lost.
        """
        ledger = self._ledger
        if ledger.done[chunk.id] or chunk.id in ledger.quarantined:
            return not ledger.done[chunk.id]
        tries = ledger.tries.get(chunk.id, 0) + counts
        quarantined = tries >= self._plan.max_tries
        first, count = self._plan.extent(chunk.id)
        if quarantined:
            ledger.store.remove_unrecorded(first, count)
        ledger.manifest.append(
            "failed", chunk=chunk.id, first=first, count=count, tries=tries, quarantined=quarantined, problem=problem
        )
        with self._lock:
            ledger.fail(chunk.id, tries, quarantined)
            if not quarantined:
                self._retry.append(chunk)
        self._metrics.count_failure(quarantined)
        return quarantined

    @ray.method(concurrency_group="files")
    def note(self, kind: str, **content: Any) -> None:
        """Record an event of the run."""
        self._ledger.manifest.append(kind, **content)

    def status(self) -> Status:
        with self._lock:
            ledger = self._ledger
            return Status(ledger.images, ledger.remaining, len(ledger.quarantined), ledger.retries)

    def _next_fresh(self, in_flight: frozenset[int]) -> Chunk | None:
        for chunk_id, requests in self._stream:
            if not (self._ledger.done[chunk_id] or chunk_id in in_flight or chunk_id in self._ledger.quarantined):
                return Chunk(chunk_id, requests)
        return None

    @cached_property
    def _stream(self) -> Iterator[tuple[int, list[Request]]]:
        source = self._plan.source
        if not source.identity().items() <= self._plan.identity["requests"].items():
            raise UserError("the jobs file changed while the batch ran: restore it and go on with --resume")
        requests = iter(source)
        return ((chunk, list(islice(requests, self._plan.chunk_size))) for chunk in range(self._plan.num_chunks))

    @property
    def _ledger(self) -> Ledger:
        # On first use, not in the constructor: its errors then reach the caller as they are.
        with self._opening:
            if self._opened is None:
                self._opened = Ledger(self._plan)
            return self._opened
