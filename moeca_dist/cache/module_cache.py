"""Outputs of whole modules (attention, shared expert, feed-forward, all blocks) kept between denoising steps.

Shape suffixes: B images, T tokens of one image, D hidden size, N chosen tokens, H heads, C channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.storage import AS_COMPUTED, Packed, Storage
from moeca_dist.kernels.types import Forecast


@dataclass(frozen=True)
class TokenIndex:
    """Some tokens of a batch in ascending order: int64 ``flat_N`` counts tokens over all images."""

    flat_N: Tensor
    tokens_per_image: int

    @property
    def image_N(self) -> Tensor:
        return self.flat_N // self.tokens_per_image

    @property
    def position_N(self) -> Tensor:
        return self.flat_N % self.tokens_per_image

    def of(self, x_BTD: Tensor) -> Tensor:
        """Return [N, D]: the rows of these tokens."""
        return x_BTD[self.image_N, self.position_N]


class ModuleCache:
    """The newest output of one module, with its finite differences over the computed steps.

    ``order`` 0 keeps the output alone (reuse, FORA). Order o forecasts with differences up to the o-th, as TaylorSeer
    does (arXiv 2503.06923, section 3.3). Steps need not be evenly spaced, and single tokens may be newer than others.
    """

    def __init__(self, order: int, storage: Storage = AS_COMPUTED) -> None:
        self.order = order
        self.storage = storage
        self._differences: list[Packed] = []
        # One step for all tokens, or an int32 tensor [B, T, 1] once tokens were stored on their own.
        self._step: int | Tensor = -1

    @property
    def value_BTD(self) -> Tensor:
        """Return the output that was computed last, token by token."""
        assert self._differences, "the first step of a request is a full step"
        return self._differences[0].unpack()

    def age_BT(self, step: int) -> Tensor:
        """Return int32: steps since each token was computed."""
        return step - self._token_steps().squeeze(-1)

    def store(self, output_BTD: Tensor, step: int) -> None:
        """Keep what was computed in ``step``. The cache owns the tensor from now on."""
        differences = [output_BTD]
        for older in self._differences[: self.order]:
            differences.append((differences[-1] - older.unpack()) / (step - self._step))
        self._differences, self._step = [self.storage.pack(difference) for difference in differences], step

    def store_tokens(self, tokens: TokenIndex, values_ND: Tensor, step: int) -> None:
        """Keep some tokens computed in ``step``, each with differences to its own last computed value.

        They may bring the first difference of an order. The other tokens then count theirs as zero.
        """
        assert self._differences, "the first step of a request is a full step"
        self._step = self._token_steps()
        if len(self._differences) <= self.order:
            self._differences.append(self.storage.zeros(self._differences[0].shape, values_ND))
        gap_N1 = step - self._step.view(-1, 1)[tokens.flat_N]
        for difference in self._differences:
            older_ND = difference.rows(tokens.flat_N)
            difference.put(tokens.flat_N, values_ND)
            values_ND = (values_ND - older_ND) / gap_N1
        self._step.view(-1)[tokens.flat_N] = step

    def forecast(self, step: int) -> Forecast:
        """Return the value expected in ``step``, to be summed up by its user."""
        assert self._differences, "the first step of a request is a full step"
        factor: float | Tensor = 1.0
        terms = []
        for degree, difference in enumerate(self._differences[1:], start=1):
            factor = factor * ((step - self._step) / degree)
            terms.append((difference.unpack(), factor))
        return Forecast(self._differences[0].unpack(), terms)

    @property
    def num_bytes(self) -> int:
        steps = self._step.nbytes if isinstance(self._step, Tensor) else 0
        return steps + sum(difference.num_bytes for difference in self._differences)

    @staticmethod
    def bytes_per_token(row_bytes: int, order: int, times_stored: int, *, with_steps: bool = False) -> int:
        """Return what is kept of a token after so many times of storing.

        Args:
            with_steps: whether the last call stored single tokens.
        """
        return min(times_stored, 1 + order) * row_bytes + (torch.int32.itemsize if with_steps else 0)

    def _token_steps(self) -> Tensor:
        if isinstance(self._step, Tensor):
            return self._step
        newest = self._differences[0].data_XD
        return torch.full((*newest.shape[:2], 1), self._step, dtype=torch.int32, device=newest.device)


class KeyValueCache:
    """Keys (rotated, as attention uses them) and values of one block, for attention token by token."""

    def __init__(self, storage: Storage = AS_COMPUTED) -> None:
        self.storage = storage
        self._kept: tuple[Packed, Packed] | None = None

    def store(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Keep those of a full step. They are copied, because both are views of larger tensors."""
        keys, values = (
            self.storage.pack(each.clone(memory_format=torch.contiguous_format)) for each in (keys_BHTC, values_BHTC)
        )
        self._kept = keys, values

    def refresh(self, tokens: TokenIndex, keys_HNC: Tensor, values_HNC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of some tokens.

        Returns:
            The keys and the values of all tokens, each [B, H, T, C], with the fresh ones as computed.
        """
        assert self._kept is not None, "the first step of a request is a full step"
        found = []
        for kept, fresh_HNC in zip(self._kept, (keys_HNC, values_HNC), strict=True):
            at_M, fresh_MC = _head_rows(tokens, kept.shape), fresh_HNC.reshape(-1, fresh_HNC.shape[-1])
            kept.put(at_M, fresh_MC)
            all_BHTC = kept.unpack()
            if not kept.is_exact:
                all_BHTC.view(-1, all_BHTC.shape[-1]).index_copy_(0, at_M, fresh_MC)
            found.append(all_BHTC)
        return found[0], found[1]

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept or ())

    @staticmethod
    def bytes_per_token(num_heads: int, head_bytes: int) -> int:
        """Return what is kept of a token.

        Args:
            head_bytes: size of the keys of one head.
        """
        return 2 * num_heads * head_bytes


def _head_rows(tokens: TokenIndex, shape_BHTC: torch.Size) -> Tensor:
    """Return int64 [H * N]: the positions of some tokens' heads among the rows [B * H * T], head by head."""
    _, heads, per_image, _ = shape_BHTC
    head_H1 = torch.arange(heads, device=tokens.flat_N.device)[:, None]
    return ((tokens.image_N * heads + head_H1) * per_image + tokens.position_N).flatten()
