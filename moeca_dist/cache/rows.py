"""Outputs of whole modules (attention, shared expert, dense block) kept between denoising steps.

Shape suffixes: B images of one segment, T tokens of one image, D hidden size.
"""

from torch import Tensor


class RowCache:
    """The newest output of one module for one segment, with its finite differences over the full steps.

    ``order`` 0 keeps the output alone (reuse, FORA); order o forecasts with differences up to the o-th, as TaylorSeer
    (arXiv 2503.06923, section 3.3) does. Steps need not be evenly spaced.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._differences: list[Tensor] = []
        self._step = -1

    def store(self, output_BTD: Tensor, step: int) -> None:
        """Keep what was computed in ``step``; the tensor must not be changed afterwards."""
        differences = [output_BTD]
        for older in self._differences[: self.order]:
            differences.append((differences[-1] - older) / (step - self._step))
        self._differences, self._step = differences, step

    def forecast_into(self, out_BTD: Tensor, step: int) -> None:
        """Write the value expected in ``step``: the stored one at order 0."""
        assert self._differences, "the first step of a request is a full step"
        out_BTD.copy_(self._differences[0])
        factor = 1.0
        for degree, difference in enumerate(self._differences[1:], start=1):
            factor *= (step - self._step) / degree
            out_BTD.add_(difference, alpha=factor)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._differences)
