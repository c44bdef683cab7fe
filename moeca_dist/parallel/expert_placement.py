"""Tables that say which rank of an expert-parallel group holds which expert. Ranks may hold different numbers of
experts.

The file is JSON with ``num_experts``, ``num_ranks`` and ``owner_of_expert``, a list of ranks for each block. If any
experts are replicated, it also has ``replicated``, a list of experts for each block.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_dist.errors import UserError


@dataclass(frozen=True)
class ExpertPlacement:
    """The owner of each expert: ``owner_of_expert[e]`` is the group rank that holds expert e. A rank may hold none.

    Every rank holds the experts in ``replicated`` (ascending). It computes their branches for its own tokens.
    """

    owner_of_expert: tuple[int, ...]
    num_ranks: int
    replicated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError for ranks or experts that do not exist."""
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
        """Return equal runs of consecutive experts. If they do not divide evenly, the first ranks hold one more."""
        share, extra = divmod(num_experts, num_ranks)
        return cls(
            tuple(rank for rank in range(num_ranks) for _ in range(share + (1 if rank < extra else 0))), num_ranks
        )

    @property
    def num_experts(self) -> int:
        return len(self.owner_of_expert)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the global ids of the experts that ``rank`` holds, ascending. Its stacked weights have the same
        order.
        """
        return tuple(expert for expert, owner in enumerate(self.owners_for(rank)) if owner == rank)

    def owners_for(self, home: int) -> tuple[int, ...]:
        """Return the rank that computes each expert's branches for the tokens of rank ``home``.

        This is ``home`` for replicated experts and the owner for all others.
        """
        if not self.replicated:
            return self.owner_of_expert
        here = set(self.replicated)
        return tuple(home if expert in here else owner for expert, owner in enumerate(self.owner_of_expert))


@dataclass(frozen=True)
class PlacementTable:
    """The ``ExpertPlacement`` of each MoE block, by block index. All have the same experts and ranks."""

    by_block: Mapping[int, ExpertPlacement]

    @classmethod
    def same(cls, placement: ExpertPlacement, blocks: Sequence[int]) -> "PlacementTable":
        """Return a table with one placement for all blocks."""
        return cls(dict.fromkeys(blocks, placement))

    @classmethod
    def contiguous(cls, blocks: Sequence[int], num_experts: int, num_ranks: int) -> "PlacementTable":
        """Return a table with equal runs of consecutive experts in all blocks."""
        return cls.same(ExpertPlacement.contiguous(num_experts, num_ranks), blocks)

    @classmethod
    def read(cls, path: Path) -> "PlacementTable":
        """Read a table that ``to_json`` wrote. Raises UserError if the file is missing or of another kind."""
        if not path.is_file():
            raise UserError(f"the expert placement {path} does not exist: write it with `moeca place`")
        try:
            content = json.loads(path.read_text())
            num_experts, num_ranks = int(content["num_experts"]), int(content["num_ranks"])
            owners = {int(block): tuple(map(int, table)) for block, table in content["owner_of_expert"].items()}
            copies = {int(block): tuple(map(int, table)) for block, table in content.get("replicated", {}).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no expert placement ({error}): write it with `moeca place`") from error
        short = [block for block, table in owners.items() if len(table) != num_experts]
        if short:
            raise UserError(f"{path}: block {short[0]} does not place {num_experts} experts: write the file anew")
        strays = sorted(set(copies) - set(owners))
        if strays:
            raise UserError(f"{path}: block {strays[0]} replicates experts that it does not place: write the file anew")
        return cls({block: ExpertPlacement(table, num_ranks, copies.get(block, ())) for block, table in owners.items()})

    def to_json(self, remarks: Mapping[str, Any]) -> str:
        """Return the table in the format of ``read``, with ``remarks`` for human readers."""
        placements = self.by_block.values()
        (num_experts,), (num_ranks,) = {p.num_experts for p in placements}, {p.num_ranks for p in placements}
        owners = {str(block): list(placement.owner_of_expert) for block, placement in self.by_block.items()}
        content = {"num_experts": num_experts, "num_ranks": num_ranks, "owner_of_expert": owners}
        if any(placement.replicated for placement in placements):
            content["replicated"] = {str(block): list(each.replicated) for block, each in self.by_block.items()}
        content |= remarks
        return json.dumps(content, indent=1) + "\n"

    def check_fits(self, blocks: Sequence[int], num_experts: int, num_ranks: int) -> None:
        """Raise UserError unless the table is for these MoE blocks, experts and expert-parallel ranks."""
        for placement in self.by_block.values():
            if (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks):
                raise UserError(
                    f"the expert placement is for {placement.num_experts} experts on {placement.num_ranks} ranks, but "
                    f"there are {num_experts} experts and {num_ranks} expert-parallel ranks: correct the table, or the "
                    "number of ranks"
                )
        if set(self.by_block) != set(blocks):
            raise UserError(
                f"the expert placement is for the blocks {sorted(self.by_block)}, but this network's MoE blocks are "
                f"{list(blocks)}: write a table for this network with `moeca place`"
            )
