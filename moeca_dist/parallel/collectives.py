"""The only caller of collectives: they move rows between ranks, the counts of rows, and small host objects.

Every method is a collective of the group: all ranks of the group call it, in the same order. A peer that dies or stays
silent past the timeout raises ``PeerLostError`` here.

Shape suffixes: C counts of a rank, P ranks of the group, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar

import deepspeed.comm as dist
import torch
from torch import Tensor

from moeca_dist.errors import PeerLostError
from moeca_dist.timing import UNTIMED, Timer

_ROWS: Final = "exchanging expert rows"

Value = TypeVar("Value")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Handle(Generic[Value]):
    """A value that its user waits for later, once. Whatever is computed until then hides the time it is under way.

    ``wait`` returns the value, and raises what went wrong meanwhile.
    """

    wait: Callable[[], Value]

    @classmethod
    def ready(cls, value: Value) -> "Handle[Value]":
        """Wrap a value that is there already."""
        return cls(lambda: value)

    def then(self, use: Callable[[Value], Other]) -> "Handle[Other]":
        """Return a handle of ``use(value)``, which is called when somebody waits. For ``parallel/`` alone."""
        return Handle(lambda: use(self.wait()))


@dataclass
class Traffic:
    """Counters of this rank's payload collectives.

    Bytes count rows that leave the rank, not those that the rank sends to itself. ``bytes_exact`` covers this rank's
    tokens, both ways, as if every routed branch were computed. ``count_exchanges`` counts the times that row counts
    were gathered. The few bytes of these counts are not included.
    """

    bytes_sent: int = 0
    bytes_exact: int | Tensor = 0
    collectives: int = 0
    collectives_skipped: int = 0
    count_exchanges: int = 0


class Collectives:
    """Collectives over one process group. ``device`` is the device whose tensors the group's backend takes."""

    def __init__(self, group: Any, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.group = group
        self.rank = rank
        self.size = size
        self.device = device
        self.timeout_s = timeout_s
        self.traffic = Traffic()
        self.timer: Timer = UNTIMED

    def gather_counts(self, counts_C: Tensor) -> Tensor:
        """Gather the int64 counts [C] of every rank.

        Returns the matrix [P, C] on the host. It is the same on all ranks.
        """
        self.traffic.count_exchanges += 1
        gathered = torch.empty(self.size, counts_C.shape[0], dtype=counts_C.dtype, device=self.device)
        with self.timer.section("wait"):
            with self._watching("agreeing on row counts"):
                dist.all_gather_into_tensor(gathered.view(-1), counts_C.to(self.device), group=self.group)
            # NOTE: a device-to-host synchronisation; variable splits need their sizes on the host.
            return gathered.cpu()

    def all_to_all_async(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Handle[Tensor]:
        """Send consecutive runs of rows to each rank and return a handle for the rows that arrive.

        The rows travel while the caller computes: on CPU in gloo's own threads, with NCCL on its own stream. The
        current stream waits for NCCL's. The sizes must agree across ranks: a mismatch aborts gloo processes. No
        gradient passes.

        Args:
            rows: [sum(sent), D]. The caller must not change them before it has waited.
            sent: number of rows for each rank.
            received: number of rows from each rank.

        Returns:
            A handle whose ``wait()`` gives [sum(received), D], ordered by sending rank.
        """
        away = rows.shape[0] - sent[self.rank]
        self.traffic.bytes_sent += away * rows.shape[1] * rows.element_size()
        self.traffic.collectives += 1
        with self.timer.section("exchange"), self._watching(_ROWS):
            # gloo moves host memory: with several ranks on one GPU the rows are staged there and back.
            staged = rows.to(self.device).contiguous()
            arriving = staged.new_empty(sum(received), rows.shape[1])
            waits = self._start(arriving, staged, list(sent), list(received))

        def finish() -> Tensor:
            with self.timer.section("exchange"), self._watching(_ROWS):
                for wait in waits:
                    wait()
                return arriving.to(rows.device)

        return Handle(finish)

    def _start(self, arriving: Tensor, rows: Tensor, sent: list[int], received: list[int]) -> list[Callable[[], Any]]:
        """Start all transfers and return the calls that wait for them. Sent tensors stay alive until then."""
        if self.device.type != "cpu":
            options = {"output_split_sizes": received, "input_split_sizes": sent, "group": self.group}
            return [dist.all_to_all_single(arriving, rows, **options, async_op=True).wait]
        # gloo sends once it has heard that the other side receives. Its own all-to-all says so after it has begun to
        # send, and the word waits behind the rows: of two ranks that do not come at the same moment, one then sends
        # after the other, and a slow link takes twice as long. So receiving comes first here.
        into, out_of = arriving.split(received), rows.split(sent)
        into[self.rank].copy_(out_of[self.rank])
        others = [(self.rank + offset) % self.size for offset in range(1, self.size)]
        in_world = {p: int(dist.get_global_rank(self.group, p)) for p in others}
        works = [dist.irecv(into[p], in_world[p], group=self.group) for p in reversed(others) if received[p]]
        works += [dist.isend(out_of[p], in_world[p], group=self.group) for p in others if sent[p]]
        # Transfers between two ranks do not have the group's timeout by themselves.
        return [partial(work.wait, timedelta(seconds=self.timeout_s)) for work in works]

    def count_skipped(self) -> None:
        """Record a payload collective that no rank needs."""
        self.traffic.collectives_skipped += 1

    def reset_traffic(self, timer: Timer = UNTIMED) -> None:
        """Set all counters to zero and measure with ``timer`` from now on. A report covers one run."""
        self.traffic = Traffic()
        self.timer = timer

    def gather_objects(self, item: Any) -> list[Any]:
        """Return every rank's small picklable object, in rank order."""
        gathered: list[Any] = [None] * self.size
        with self._watching("gathering results"):
            dist.all_gather_object(gathered, item, group=self.group)
        return gathered

    def gather_to_first(self, block: Tensor, rows_per_rank: Sequence[int]) -> list[Tensor] | None:
        """Send blocks of different lengths to group rank 0.

        Args:
            block: [rows_per_rank[rank], ...]. The trailing shape and the dtype are the same on all ranks.

        Returns:
            One block per rank on the group's device, or None on all ranks but the first.
        """
        width = block[0].numel() if block.shape[0] else block.new_empty(block.shape[1:]).numel()
        flat = block.reshape(block.shape[0], width).contiguous().to(self.device)
        sent = [flat.shape[0] if rank == 0 else 0 for rank in range(self.size)]
        received = [rows if self.rank == 0 else 0 for rows in rows_per_rank]
        out = flat.new_empty(sum(received), width)
        with self._watching("gathering images"):
            dist.all_to_all_single(out, flat, output_split_sizes=received, input_split_sizes=sent, group=self.group)
        if self.rank:
            return None
        return [part.view(-1, *block.shape[1:]) for part in out.split(list(rows_per_rank))]

    def barrier(self) -> None:
        with self._watching("waiting for all ranks"):
            dist.barrier(group=self.group)

    @contextmanager
    def _watching(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self.rank} of a group of {self.size} lost contact while {doing}: another rank died or did not "
                f"answer within {self.timeout_s:g} s; see the other ranks' output, or raise parallel.timeout_s "
                f"({str(error).splitlines()[0]})"
            ) from error
