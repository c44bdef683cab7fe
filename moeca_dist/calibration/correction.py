"""Calibrated corrections of what the solver gets from the halves' outputs.

Where a cache serves some steps, every output that the solver gets is off by a little, and the state drifts from the
exact one. Two things are known by then that plain guidance does not use: the outputs of the last full steps, from which
the network's path can be told better than from its extrapolation alone, and, at a full step, by how much the steps
served since the last one were wrong. The correction is linear in them,

    output = guided + sum_k w[step, k] * term_k,

with one scalar per step and term for all images, fitted offline on exact trajectories (``calibration/fit.py``): a
linear multistep method (Adams-Bashforth predictor, Adams-Moulton corrector) whose coefficients are measured instead of
derived, as in Bespoke Non-Stationary solvers (arXiv 2403.01329). It costs a few additions per step, needs no
communication, and leaves an image independent of its batch.

Shape suffixes: B images, C guided channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_dist.cache.policy import HALVES, Half
from moeca_dist.sampling.guidance import Guidance
from moeca_dist.types import StepContext

IsFull = Callable[[StepContext, Half], bool]
DEFAULT_HISTORY = 3


@dataclass
class OutputMemory:
    """What the terms of one batch are made of; float32 throughout.

    Terms of a half: its output now, its outputs at the last ``history`` full steps (newest first), and the sum of what
    was served since the last of them, which has weight at full steps only. After those of all halves comes the state.
    """

    is_full: IsFull
    history: int
    _full: dict[Half, list[Tensor]] = field(default_factory=dict)
    _served: dict[Half, Tensor] = field(default_factory=dict)

    def terms(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext) -> list[Tensor | None]:
        """The terms of a step, ``num_terms`` of them, None where one does not exist; then the step is remembered."""
        terms: list[Tensor | None] = []
        for half, output in zip(HALVES, halves, strict=False):
            now_BCHW = output.float()
            past = self._full.setdefault(half, [])
            full = self.is_full(step, half)
            terms += [now_BCHW, *past, *[None] * (self.history - len(past))]
            terms.append(self._served.get(half) if full else None)
            self._remember(half, now_BCHW, full)
        return [*terms, x_BCHW.float()]

    @property
    def num_bytes(self) -> int:
        held = [*self._served.values(), *(output for outputs in self._full.values() for output in outputs)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @staticmethod
    def num_kept(history: int, num_full: int, *, is_full: bool) -> int:
        """Return how many outputs of a half are kept after ``num_full`` full steps; ``is_full``: the last one was."""
        return min(num_full, history) + (not is_full)

    def _remember(self, half: Half, now_BCHW: Tensor, full: bool) -> None:
        if full:
            self._full[half] = [now_BCHW, *self._full[half]][: self.history]
            self._served.pop(half, None)
        else:
            so_far = self._served.get(half)
            self._served[half] = now_BCHW if so_far is None else so_far + now_BCHW


def num_terms(num_halves: int, history: int) -> int:
    return num_halves * (history + 2) + 1


@dataclass(frozen=True)
class OutputWeights:
    """Calibrated weights: one row of ``num_terms`` per step, zero where a term does not exist."""

    history: int
    steps: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Corrected:
    """Guidance with calibrated corrections, for one batch."""

    guidance: Guidance
    weights: OutputWeights
    memory: OutputMemory

    def __call__(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext, /) -> Tensor:
        terms = self.memory.terms(halves, x_BCHW, step)
        return weighted(self.guidance(halves, x_BCHW, step), terms, self.weights.steps[step.index])


def weighted(guided_BCHW: Tensor, terms: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """float32 ``guided + sum_k weights[k] * terms[k]``; terms that do not exist have no weight."""
    out_BCHW = guided_BCHW.to(torch.float32, copy=True)
    for term, weight in zip(terms, weights, strict=True):
        if term is not None and weight:
            out_BCHW.add_(term[:, : out_BCHW.shape[1]], alpha=weight)
    return out_BCHW
