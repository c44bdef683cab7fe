"""Search by proxy: an evolution strategy (mu + lambda) over schedules with a given number of full steps."""

import random
from collections.abc import Callable, Sequence

from moeca_dist.tuning.schedules import Schedule, distance, even, neighbour

PARENTS = 8
CHILDREN = 64

Score = Callable[[Sequence[Schedule]], list[float]]
"""Schedules -> what each is worth; more is better."""


class Search:
    """Everything follows from the arguments: no clock, no global random numbers."""

    def __init__(self, score: Score, total: int, num_steps: int, num_halves: int, seed: int) -> None:
        self._score = score
        self._num_steps = num_steps
        # Other totals draw other numbers, so that the order in which they are searched does not matter.
        self._draw = random.Random(f"{seed} {total}")
        self.found: dict[Schedule, float] = {}
        self._add([even(total, num_steps, num_halves)])

    def advance(self) -> None:
        """One generation: random neighbours of the best so far are scored."""
        parents = self.best(PARENTS)
        children = {neighbour(self._draw.choice(parents), self._num_steps, self._draw) for _ in range(CHILDREN)}
        self._add(sorted(children - self.found.keys()))

    def best(self, count: int, apart: int = 1) -> list[Schedule]:
        """The best schedules, best first, each with at least ``apart`` full steps that a better one lacks."""
        chosen: list[Schedule] = []
        for schedule in sorted(self.found, key=lambda each: (-self.found[each], each)):
            if all(distance(schedule, other) >= apart for other in chosen):
                chosen.append(schedule)
                if len(chosen) == count:
                    break
        return chosen

    def _add(self, schedules: Sequence[Schedule]) -> None:
        if schedules:
            self.found |= dict(zip(schedules, self._score(schedules), strict=True))
