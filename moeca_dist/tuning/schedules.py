"""Schedules as the search sees them: one sorted tuple of full steps for each guidance half."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

Schedule = tuple[tuple[int, ...], ...]
"""Full steps of the conditional half and, with guidance, of the unconditional one; step 0 is in both."""


def num_full(schedule: Schedule) -> int:
    """Full steps of all halves together: what a schedule costs."""
    return sum(len(steps) for steps in schedule)


def even(total: int, num_steps: int, num_halves: int) -> Schedule:
    """``total`` full steps, evenly placed; one more for the first halves where they do not divide."""
    counts = [(total + num_halves - 1 - half) // num_halves for half in range(num_halves)]
    return tuple(tuple(place * num_steps // count for place in range(count)) for count in counts)


def as_mask(schedules: Sequence[Schedule], num_steps: int) -> Tensor:
    """bool [S, H, N] for S schedules of H halves over N steps."""
    mask_SHN = torch.zeros(len(schedules), len(schedules[0]), num_steps, dtype=torch.bool)
    for index, schedule in enumerate(schedules):
        for half, steps in enumerate(schedule):
            mask_SHN[index, half, list(steps)] = True
    return mask_SHN


def distance(first: Schedule, second: Schedule) -> int:
    """Full steps of ``first`` that ``second`` does not have."""
    return sum(len(set(mine) - set(theirs)) for mine, theirs in zip(first, second, strict=True))


def neighbour(schedule: Schedule, num_steps: int, draw: random.Random) -> Schedule:
    """One to three random moves: a full step shifted by a few places, or taken away here and put anywhere, also into
    the other half. The number of full steps stays.
    """
    halves = [set(steps) for steps in schedule]
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
        if draw.random() < 0.7:
            _shift(draw.choice(halves), num_steps, draw)
        else:
            _transfer(draw.choice(halves), draw.choice(halves), num_steps, draw)
    return tuple(tuple(sorted(steps)) for steps in halves)


def _shift(steps: set[int], num_steps: int, draw: random.Random) -> None:
    if len(steps) < 2:
        return
    step = draw.choice(sorted(steps - {0}))
    target = step + draw.choice((-4, -3, -2, -1, 1, 2, 3, 4))
    if 0 < target < num_steps and target not in steps:
        steps.remove(step)
        steps.add(target)


def _transfer(source: set[int], target: set[int], num_steps: int, draw: random.Random) -> None:
    if len(source) < 2 or len(target) == num_steps:
        return
    source.remove(draw.choice(sorted(source - {0})))
    target.add(draw.choice(sorted(set(range(num_steps)) - target)))
