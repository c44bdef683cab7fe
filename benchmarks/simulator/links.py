"""What an exchange should take: a model of links, from the bytes that every rank sends and receives.

A collective starts after a latency, pays for each message, and then every link carries its bytes; the busiest link is
the last to finish. Links of different levels (within an island, between nodes) are different wires and work at once.
Numbers for a machine come from the caller: measured, or from its makers' figures.

Shape suffixes: P ranks of the group as homes, O owners among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COUNT_BYTES = 8  # of one number of the agreement on row counts


@dataclass(frozen=True)
class Level:
    """One level of a topology: blocks of ``ranks`` consecutive ranks, reached over links of one kind.

    ``bytes_per_s``: of a rank's link in each direction, as a collective reaches it. ``latency_s``: from the start of a
    collective that uses the level to its first byte; ``message_s``: for every peer that a rank sends to.
    """

    name: str
    ranks: int
    bytes_per_s: float
    latency_s: float
    message_s: float = 0.0


@dataclass(frozen=True)
class Topology:
    """Levels from the innermost outwards, each holding whole blocks of the one before, e.g. an NVLink island of 8
    ranks and the network between nodes. The outermost reaches all ranks."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where blocks do not nest."""
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if outer.ranks % inner.ranks:
                raise ValueError(f"{outer.name} blocks of {outer.ranks} ranks do not hold whole {inner.name} blocks")

    def all_to_all_s(self, sent_PO: NDArray[np.number], owners_O: NDArray[np.integer]) -> float:
        """Seconds of the payload collective in which home p sends ``sent_PO[p, o]`` bytes to rank ``owners_O[o]``.

        The way back is the same collective with the directions exchanged, and takes as long.
        """
        num_ranks = sent_PO.shape[0]
        levels = self._used(num_ranks)
        busiest, inner = 0.0, 1
        for level in levels:
            beyond_PO = self._beyond(num_ranks, owners_O, inner)
            beyond_PO &= ~self._beyond(num_ranks, owners_O, level.ranks) if level is not levels[-1] else True
            crossing_PO = np.where(beyond_PO, sent_PO, 0)
            most = max(crossing_PO.sum(1).max(initial=0), crossing_PO.sum(0).max(initial=0))
            busiest, inner = max(busiest, float(most) / level.bytes_per_s), level.ranks
        return self._start_s(num_ranks) + busiest

    def gather_counts_s(self, num_ranks: int, numbers: int) -> float:
        """Every rank learns ``numbers`` counts of every rank: what the outermost level carries decides."""
        if num_ranks == 1:
            return 0.0
        level = self._used(num_ranks)[-1]
        # Rings and trees start a logarithmic number of times; every byte of the result arrives at every rank.
        starts = level.latency_s + level.message_s * np.log2(num_ranks)
        return float(starts + (num_ranks - 1) * numbers * COUNT_BYTES / level.bytes_per_s)

    def _used(self, num_ranks: int) -> Sequence[Level]:
        """The levels that a group of consecutive ranks needs."""
        inside = [level for level in self.levels if level.ranks < num_ranks]
        return self.levels[: min(len(inside) + 1, len(self.levels))]

    def _start_s(self, num_ranks: int) -> float:
        if num_ranks == 1:
            return 0.0
        messages, inner = 0.0, 1
        levels = self._used(num_ranks)
        for level in levels:
            peers = num_ranks if level is levels[-1] else level.ranks
            messages += level.message_s * (peers - inner)
            inner = peers
        return max(level.latency_s for level in levels) + messages

    @staticmethod
    def _beyond(num_ranks: int, owners_O: NDArray[np.integer], ranks: int) -> NDArray[np.bool_]:
        """[P, O]: whether home and owner lie in different blocks of so many ranks."""
        return np.arange(num_ranks)[:, None] // ranks != owners_O[None, :] // ranks


class LimitedLinks:
    """Every rank's cable behind one switch, limited by token buckets in both directions, as Linux' tbf makes them.

    A bucket holds ``burst_bytes`` that pass at once, and fills at the rate of the link while it is idle. Keeps the
    level of every bucket, so calls come in the order of time.
    """

    def __init__(self, num_ranks: int, bytes_per_s: float, burst_bytes: float) -> None:
        self._rate, self._burst = bytes_per_s, burst_bytes
        # Of what each rank sends, and of what it receives.
        self._tokens_2P = np.full((2, num_ranks), burst_bytes)

    def wait(self, seconds: float) -> None:
        """Nothing is sent for so long."""
        self._tokens_2P = np.minimum(self._burst, self._tokens_2P + seconds * self._rate)

    def transfer_s(self, out_P: NDArray[np.number], in_P: NDArray[np.number]) -> float:
        """Seconds until the last byte has arrived."""
        bytes_2P = np.stack([out_P, in_P]).astype(np.float64)
        seconds = float(np.maximum(bytes_2P - self._tokens_2P, 0).max() / self._rate)
        self._tokens_2P = np.minimum(self._burst, self._tokens_2P - bytes_2P + seconds * self._rate)
        return seconds
