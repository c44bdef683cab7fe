"""Which rank of an expert-parallel group holds which expert: a table, so that counts may be uneven."""

from dataclasses import dataclass

from moeca_dist.errors import UserError


@dataclass(frozen=True)
class ExpertPlacement:
    """``owner_of_expert[e]`` is the group rank that holds expert e; a rank may hold none.

    Experts in ``replicated``, ascending, are held by every rank: their branches are computed where the token lives.
    """

    owner_of_expert: tuple[int, ...]
    num_ranks: int
    replicated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for ranks or experts that are not there."""
        if list(self.replicated) != sorted(set(self.replicated) & set(range(self.num_experts))):
            raise UserError(
                f"expert placement replicates experts {list(self.replicated)}, but a list of some of 0.."
                f"{self.num_experts - 1}, ascending, is needed: correct the table"
            )
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
        return tuple(expert for expert, owner in enumerate(self.owners_for(rank)) if owner == rank)

    def owners_for(self, home: int) -> tuple[int, ...]:
        """Where each expert's branches of ``home``'s tokens are computed: at their owner, or here."""
        if not self.replicated:
            return self.owner_of_expert
        here = set(self.replicated)
        return tuple(home if expert in here else owner for expert, owner in enumerate(self.owner_of_expert))
