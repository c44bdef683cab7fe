"""Outputs of whole modules (attention, shared expert, dense block) kept between denoising steps.

Shape suffixes: B images of one segment (of the whole batch in ``Rows``), T tokens of one image, D hidden size, N rows:
chosen tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some tokens of a batch in ascending order: int64 ``flat_N`` counts tokens over all images."""

    flat_N: Tensor
    tokens_per_image: int

    @property
    def image_N(self) -> Tensor:
        return self.flat_N // self.tokens_per_image

    @property
    def position_N(self) -> Tensor:
        return self.flat_N % self.tokens_per_image

    def within(self, images: slice) -> tuple[slice, "Rows"]:
        """Those of a range of images, counted from its first: where they stand among all, and what they are."""
        first = images.start * self.tokens_per_image
        bounds = torch.tensor([first, images.stop * self.tokens_per_image], device=self.flat_N.device)
        # NOTE: a host synchronisation on CUDA.
        start, stop = torch.searchsorted(self.flat_N, bounds).tolist()
        window = slice(start, stop)
        return window, Rows(self.flat_N[window] - first, self.tokens_per_image)


class RowCache:
    """The newest output of one module for one segment, with its finite differences over the computed steps.

    ``order`` 0 keeps the output alone (reuse, FORA); order o forecasts with differences up to the o-th, as TaylorSeer
    (arXiv 2503.06923, section 3.3) does. Steps need not be evenly spaced, and single rows may be newer than others.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._differences: list[Tensor] = []
        # One step for all rows, or an int32 tensor [B, T, 1] once rows were stored on their own.
        self._step: int | Tensor = -1

    @property
    def value_BTD(self) -> Tensor:
        """What was computed last, row by row."""
        assert self._differences, "the first step of a request is a full step"
        return self._differences[0]

    def age_BT(self, step: int) -> Tensor:
        """Steps since each row was computed, int32."""
        return step - self._row_steps().squeeze(-1)

    def store(self, output_BTD: Tensor, step: int) -> None:
        """Keep what was computed in ``step``; the cache owns the tensor from now on."""
        differences = [output_BTD]
        for older in self._differences[: self.order]:
            differences.append((differences[-1] - older) / (step - self._step))
        self._differences, self._step = differences, step

    def store_rows(self, rows: Rows, values_ND: Tensor, step: int) -> None:
        """Keep some rows computed in ``step``, each with differences to its own last computed value."""
        like_BTD = self.value_BTD
        self._step = self._row_steps()
        if len(self._differences) <= self.order:
            self._differences.append(torch.zeros_like(like_BTD))
        gap_N1 = step - self._step.view(-1, 1)[rows.flat_N]
        for difference in self._differences:
            flat = difference.view(-1, like_BTD.shape[-1])
            older_ND = flat.index_select(0, rows.flat_N)
            flat.index_copy_(0, rows.flat_N, values_ND)
            values_ND = (values_ND - older_ND) / gap_N1
        self._step.view(-1)[rows.flat_N] = step

    def forecast_into(self, out_BTD: Tensor, step: int) -> None:
        """Write the value expected in ``step``: the stored one at order 0."""
        if len(self._differences) == 1:
            out_BTD.copy_(self.value_BTD)
        sum_BTD = self.value_BTD
        factor: float | Tensor = 1.0
        for degree, difference in enumerate(self._differences[1:], start=1):
            factor = factor * ((step - self._step) / degree)
            # One pass for each order: copying first would be another over memory, which is all that a forecast costs.
            if isinstance(factor, Tensor):
                torch.addcmul(sum_BTD, difference, factor.to(difference.dtype), out=out_BTD)
            else:
                torch.add(sum_BTD, difference, alpha=factor, out=out_BTD)
            sum_BTD = out_BTD

    @property
    def num_bytes(self) -> int:
        held = [*self._differences, *([self._step] if isinstance(self._step, Tensor) else [])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _row_steps(self) -> Tensor:
        if isinstance(self._step, Tensor):
            return self._step
        images, tokens = self.value_BTD.shape[:2]
        return torch.full((images, tokens, 1), self._step, dtype=torch.int32, device=self.value_BTD.device)


class KeyValueCache:
    """Keys (rotated, as attention uses them) and values of one block and segment, for attention row by row."""

    def __init__(self) -> None:
        self.keys_BHTC: Tensor | None = None
        self.values_BHTC: Tensor | None = None

    def store(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Keep those of a full step; copies, because both are views of larger tensors."""
        self.keys_BHTC = keys_BHTC.clone(memory_format=torch.contiguous_format)
        self.values_BHTC = values_BHTC.clone(memory_format=torch.contiguous_format)

    def store_rows(self, rows: Rows, keys_HNC: Tensor, values_HNC: Tensor) -> None:
        """Keep those of single tokens: H heads, N rows, C channels of a head."""
        assert self.keys_BHTC is not None and self.values_BHTC is not None, "the first step is a full step"
        image_N, position_N = rows.image_N, rows.position_N
        self.keys_BHTC[image_N, :, position_N] = keys_HNC.transpose(0, 1)
        self.values_BHTC[image_N, :, position_N] = values_HNC.transpose(0, 1)

    @property
    def num_bytes(self) -> int:
        held = [tensor for tensor in (self.keys_BHTC, self.values_BHTC) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
