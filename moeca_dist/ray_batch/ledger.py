"""The state of a batch that follows from its manifest: which chunks are recorded, failed or given up."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_dist.ray_batch.jobs import Source
from moeca_dist.ray_batch.manifest import Manifest, read_records
from moeca_dist.ray_batch.store import Store

LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Plan:
    """The plan of a batch, as the supervisor gets it.

    ``chunk_size`` is the number of images per chunk, one round of a gang. ``identity`` is that of
    ``identity.batch_identity``.
    """

    folder: Path
    source: Source
    num_images: int
    chunk_size: int
    max_tries: int
    identity: Mapping[str, Any]

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_size)

    def extent(self, chunk: int) -> tuple[int, int]:
        """Return the first image of a chunk and its number of images."""
        first = chunk * self.chunk_size
        return first, min(self.chunk_size, self.num_images - first)


class Ledger:
    """The manifest and the state that follows from it, in one byte per chunk."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.manifest = Manifest(plan.folder, LOCK_TIMEOUT_S)
        # After the lock is held: opening removes what a writer that died has left.
        self.store = Store(plan.folder)
        self.done = bytearray(plan.num_chunks)
        self.images = 0
        self.remaining = plan.num_chunks
        self.retries = 0
        self.tries: dict[int, int] = {}
        self.quarantined: set[int] = set()
        self.empty = True
        for record in read_records(self.manifest.path):
            self.empty = False
            self._replay(record)

    def _replay(self, record: Mapping[str, Any]) -> None:
        match record["kind"]:
            case "chunk":
                self.complete(record["chunk"])
            case "void":
                self.void(record["chunk"])
            case "failed":
                self.fail(record["chunk"], record["tries"], record["quarantined"])
            case "run":
                self.forget_failures()

    def complete(self, chunk: int) -> None:
        if not self.done[chunk]:
            self.done[chunk] = 1
            self.images += self._plan.extent(chunk)[1]
            self.remaining -= chunk not in self.quarantined
            self.quarantined.discard(chunk)
            self.tries.pop(chunk, None)

    def void(self, chunk: int) -> None:
        if self.done[chunk]:
            self.done[chunk] = 0
            self.images -= self._plan.extent(chunk)[1]
            self.remaining += 1

    def fail(self, chunk: int, tries: int, quarantined: bool) -> None:
        self.tries[chunk] = tries
        if quarantined:
            self.quarantined.add(chunk)
            self.remaining -= 1
        else:
            self.retries += 1

    def forget_failures(self) -> None:
        """Forget all failures, so that a new run tries again the chunks that an earlier run gave up."""
        self.remaining += len(self.quarantined)
        self.quarantined.clear()
        self.tries.clear()
