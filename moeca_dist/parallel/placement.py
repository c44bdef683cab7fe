"""Which rank of an expert-parallel group holds which expert: a table, so that counts may be uneven."""

from dataclasses import dataclass

from moeca_dist.errors import UserError


@dataclass(frozen=True)
class ExpertPlacement:
    """``owner_of_expert[e]`` is the group rank that holds expert e; a rank may hold none."""

    owner_of_expert: tuple[int, ...]
    num_ranks: int

    def __post_init__(self) -> None:
        strays = sorted({owner for owner in self.owner_of_expert if not 0 <= owner < self.num_ranks})
        if strays:
            raise UserError(
                f"expert placement names ranks {strays}, but the expert-parallel group has ranks "
                f"0..{self.num_ranks - 1}: correct the table"
            )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> "ExpertPlacement":
        """Equal runs of consecutive experts; the first ranks hold one more where they do not divide evenly."""
        share, extra = divmod(num_experts, num_ranks)
        return cls(
            tuple(rank for rank in range(num_ranks) for _ in range(share + (1 if rank < extra else 0))), num_ranks
        )

    @property
    def num_experts(self) -> int:
        return len(self.owner_of_expert)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Global ids of the experts that ``rank`` holds, ascending: the order of its stacked weights."""
        return tuple(expert for expert, owner in enumerate(self.owner_of_expert) if owner == rank)

    @property
    def send_order(self) -> tuple[int, ...]:
        """Global expert ids sorted by (owner, id): rows sent in this order are grouped by rank, then by expert."""
        return tuple(expert for rank in range(self.num_ranks) for expert in self.experts_of(rank))
