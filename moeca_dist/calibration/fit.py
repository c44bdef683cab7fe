"""Calibrated weights (``calibration/correction.py``): fitted step by step against exact trajectories, by least squares.

The cached run goes along with corrected outputs, as it will in use. In each step the weights are chosen so that the
next state comes closest to the exact one over all images of the calibration. With next = a * state + b * output +
noise, the output should have been

    target = exact output + (a / b) * (exact state - state),

so what the states have drifted apart is made good at once, as far as the terms can. A handful of scalars per step
against every pixel of every image: nothing to overfit.

Shape suffixes: B images, C guided channels, H height, W width, K terms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_dist.calibration.correction import OutputMemory, OutputWeights, weighted
from moeca_dist.sampling.guidance import Guidance
from moeca_dist.sampling.sampler import Gains
from moeca_dist.types import StepContext

# Relative to the terms' own energy: keeps weights near plain guidance along directions that the images do not show.
RIDGE = 1e-6

Reduce = Callable[[Tensor], Tensor]
"""float64 tensor of this rank -> its sum over all ranks, the same bits on all of them."""


@dataclass
class Recorded:
    """Plain guidance that remembers an exact trajectory, float32 [B, C, H, W] throughout.

    ``outputs`` and ``states`` of every step, and, where ``keep_halves``, what each guidance half gave in it.
    """

    guidance: Guidance
    keep_halves: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    halves: list[list[Tensor]] = field(default_factory=list)

    def __call__(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext, /) -> Tensor:
        out_BCHW = self.guidance(halves, x_BCHW, step)
        self.outputs.append(out_BCHW.float())
        self.states.append(x_BCHW.float())
        if self.keep_halves:
            self.halves.append([half.float() for half in halves])
        return out_BCHW


@dataclass
class Fitted:
    """Corrected guidance whose weights are fitted while it runs; ``weights`` are there after the last step."""

    guidance: Guidance
    memory: OutputMemory
    exact: Recorded
    gains: Gains
    reduce: Reduce
    rows: list[tuple[float, ...]] = field(default_factory=list)

    def __call__(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext, /) -> Tensor:
        terms = self.memory.terms(halves, x_BCHW, step)
        guided_BCHW = self.guidance(halves, x_BCHW, step).float()
        drifted_BCHW = self.exact.states[step.index] - x_BCHW
        of_state, of_output = self.gains(step.index, step.num_steps)
        target_BCHW = self.exact.outputs[step.index] + of_state / of_output * drifted_BCHW
        row = least_squares(terms, target_BCHW - guided_BCHW, self.reduce)
        self.rows.append(row)
        return weighted(guided_BCHW, terms, row)

    @property
    def weights(self) -> OutputWeights:
        return OutputWeights(self.memory.history, tuple(self.rows))


def least_squares(terms: Sequence[Tensor | None], residual_BCHW: Tensor, reduce: Reduce) -> tuple[float, ...]:
    """Weights [K] with which the terms come closest to the residual over all ranks' images; 0 for missing terms.

    Which terms exist follows from the schedule, so all ranks solve the same system, also those without images.
    """
    there = [index for index, term in enumerate(terms) if term is not None]
    residual_N = residual_BCHW.flatten().double()
    present = [term.flatten().double() for term in terms if term is not None]
    terms_NK = torch.stack(present, dim=1)
    columns = torch.cat([terms_NK, residual_N[:, None]], dim=1)
    products = reduce(terms_NK.T @ columns).cpu()
    gram_KK, right_K = products[:, :-1], products[:, -1]
    energy_K = gram_KK.diagonal()
    # A term that is zero everywhere (no images at all) would make the system singular.
    gram_KK = gram_KK + torch.diag(RIDGE * energy_K + torch.finfo(torch.float64).tiny)
    solved = torch.linalg.solve(gram_KK, right_K)
    weights = [0.0] * len(terms)
    for index, weight in zip(there, solved.tolist(), strict=True):
        weights[index] = weight
    return tuple(weights)
