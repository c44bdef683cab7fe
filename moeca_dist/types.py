"""Value types shared by all layers of the package.

Shape suffixes: B images, T tokens (of all images of a rank), D hidden size, K routed experts per token.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One image to generate. The image depends on (seed, index, label) and the sampling settings alone."""

    index: int
    label: int
    seed: int = 0


@dataclass(frozen=True)
class Routing:
    """The router's decision for every token of a rank.

    ``expert_ids_TK``: int64 global expert ids, distinct within a row; the slot order carries no meaning.
    ``gates_TK``: float weights of the chosen experts, already normalised and scaled as the model demands.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_TK.shape[0]

    @property
    def num_experts_per_tok(self) -> int:
        return self.expert_ids_TK.shape[1]
