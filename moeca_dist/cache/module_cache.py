"""Outputs of whole modules (attention, shared expert, dense block) kept between denoising steps.

Shape suffixes: B images of one segment (of the whole batch in ``Rows``), T tokens of one image, D hidden size, N rows:
chosen tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage
from moeca_dist.kernels.types import Forecast


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

    def __init__(self, order: int, storage: Storage = AS_COMPUTED) -> None:
        self.order = order
        self.storage = storage
        self._differences: list[Packed] = []
        # One step for all rows, or an int32 tensor [B, T, 1] once rows were stored on their own.
        self._step: int | Tensor = -1

    @property
    def value_BTD(self) -> Tensor:
        """What was computed last, row by row."""
        assert self._differences, "the first step of a request is a full step"
        return self._differences[0].unpack()

    def age_BT(self, step: int) -> Tensor:
        """Steps since each row was computed, int32."""
        return step - self._row_steps().squeeze(-1)

    def store(self, output_BTD: Tensor, step: int) -> None:
        """Keep what was computed in ``step``; the cache owns the tensor from now on."""
        differences = [output_BTD]
        for older in self._differences[: self.order]:
            differences.append((differences[-1] - older.unpack()) / (step - self._step))
        self._differences, self._step = [self.storage.pack(difference) for difference in differences], step

    def store_rows(self, rows: Rows, values_ND: Tensor, step: int) -> None:
        """Keep some rows computed in ``step``, each with differences to its own last computed value.

        They may bring the first difference of an order; the other rows then count theirs as zero.
        """
        assert self._differences, "the first step of a request is a full step"
        self._step = self._row_steps()
        if len(self._differences) <= self.order:
            self._differences.append(self.storage.zeros(self._differences[0].shape, values_ND))
        gap_N1 = step - self._step.view(-1, 1)[rows.flat_N]
        for difference in self._differences:
            older_ND = difference.rows(rows.flat_N)
            difference.put(rows.flat_N, values_ND)
            values_ND = (values_ND - older_ND) / gap_N1
        self._step.view(-1)[rows.flat_N] = step

    def forecast_into(self, out_BTD: Tensor, step: int) -> None:
        """Write the value expected in ``step``: the stored one at order 0."""
        forecast = self.forecast(step)
        if not forecast.terms:
            out_BTD.copy_(forecast.value_BTD)
        sum_BTD = forecast.value_BTD
        for difference_BTD, factor in forecast.terms:
            # One pass for each order: copying first would be another over memory, which is all that a forecast costs.
            if isinstance(factor, Tensor):
                torch.addcmul(sum_BTD, difference_BTD, factor.to(difference_BTD.dtype), out=out_BTD)
            else:
                torch.add(sum_BTD, difference_BTD, alpha=factor, out=out_BTD)
            sum_BTD = out_BTD

    def forecast(self, step: int) -> Forecast:
        """The value expected in ``step``, to be summed up where it is used."""
        factor: float | Tensor = 1.0
        terms = []
        for degree, difference in enumerate(self._differences[1:], start=1):
            factor = factor * ((step - self._step) / degree)
            terms.append((difference.unpack(), factor))
        return Forecast(self.value_BTD, terms)

    @property
    def num_bytes(self) -> int:
        steps = self._step.numel() * self._step.element_size() if isinstance(self._step, Tensor) else 0
        return steps + sum(difference.num_bytes for difference in self._differences)

    def _row_steps(self) -> Tensor:
        if isinstance(self._step, Tensor):
            return self._step
        newest = self._differences[0].data_XD
        return torch.full((*newest.shape[:2], 1), self._step, dtype=torch.int32, device=newest.device)


class KeyValueCache:
    """Keys (rotated, as attention uses them) and values of one block and segment, for attention row by row.

    Shape suffixes: H heads, C channels of a head.
    """

    def __init__(self, storage: Storage = AS_COMPUTED) -> None:
        self.storage = storage
        self._kept: tuple[Packed, Packed] | None = None

    def store(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Keep those of a full step; copies, because both are views of larger tensors."""
        keys, values = (
            self.storage.pack(each.clone(memory_format=torch.contiguous_format)) for each in (keys_BHTC, values_BHTC)
        )
        self._kept = keys, values

    def store_rows(self, rows: Rows, keys_HNC: Tensor, values_HNC: Tensor) -> None:
        """Keep those of single tokens."""
        for kept, fresh_HNC in zip(self._stored(), (keys_HNC, values_HNC), strict=True):
            kept.put(_head_rows(rows, kept.shape), fresh_HNC.reshape(-1, fresh_HNC.shape[-1]))

    def read(self, rows: Rows, keys_HNC: Tensor, values_HNC: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, T, C] of all tokens, after ``store_rows`` of the same: these as computed, not as stored."""
        found = []
        for kept, fresh_HNC in zip(self._stored(), (keys_HNC, values_HNC), strict=True):
            all_BHTC = kept.unpack()
            if not kept.is_exact:
                flat = all_BHTC.view(-1, all_BHTC.shape[-1])
                flat.index_copy_(0, _head_rows(rows, kept.shape), fresh_HNC.reshape(-1, flat.shape[-1]))
            found.append(all_BHTC)
        return found[0], found[1]

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept or ())

    def _stored(self) -> tuple[Packed, Packed]:
        assert self._kept is not None, "the first step of a request is a full step"
        return self._kept


def _head_rows(rows: Rows, shape_BHTC: torch.Size) -> Tensor:
    """Where the heads of some tokens are among the rows [B * H * T], head by head."""
    _, heads, tokens, _ = shape_BHTC
    head_H1 = torch.arange(heads, device=rows.flat_N.device)[:, None]
    return ((rows.image_N * heads + head_H1) * tokens + rows.position_N).flatten()
