"""Which experts every token was routed to in a run, and which of these branches were computed.

A trace is what expert placement is chosen from, and what the scaling simulator replays. The axes of its arrays are
denoising steps, MoE blocks, guidance halves, images, tokens of an image, and the slots of a token's routing.

Shape suffixes: S steps, L MoE blocks, H guidance halves, B images, T tokens of one image, K routed experts per token.
"""

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moeca_dist.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class RoutingTrace:
    """``expert_ids_SLHBTK``: uint8 or uint16. ``refreshed_SLHBTK``: bool, the branches that were computed.

    Where no router ran (a policy served the module as a whole) nothing is refreshed and the ids mean nothing.
    ``blocks``: the index of each MoE block. ``row_bytes``: size of a hidden row. ``keeps_branches``: whether
    branches return one by one to be kept at home, and not in sums. ``source``: what was recorded, for people.
    """

    expert_ids_SLHBTK: NDArray[np.unsignedinteger]
    refreshed_SLHBTK: NDArray[np.bool_]
    blocks: tuple[int, ...]
    num_experts: int
    row_bytes: int
    keeps_branches: bool
    source: str = ""

    def __post_init__(self) -> None:
        assert self.expert_ids_SLHBTK.shape == self.refreshed_SLHBTK.shape and self.expert_ids_SLHBTK.ndim == 6
        assert self.expert_ids_SLHBTK.shape[1] == len(self.blocks)

    @property
    def num_steps(self) -> int:
        return self.expert_ids_SLHBTK.shape[0]

    @property
    def num_images(self) -> int:
        return self.expert_ids_SLHBTK.shape[3]

    @property
    def num_experts_per_tok(self) -> int:
        return self.expert_ids_SLHBTK.shape[5]

    def first_images(self, count: int) -> "RoutingTrace":
        """The part of the first ``count`` images; UserError where there are fewer."""
        if count > self.num_images:
            raise UserError(f"the trace holds {self.num_images} images, not {count}: record more")
        images = np.s_[:, :, :, :count]
        return replace(
            self, expert_ids_SLHBTK=self.expert_ids_SLHBTK[images], refreshed_SLHBTK=self.refreshed_SLHBTK[images]
        )

    def save(self, path: Path) -> None:
        """A compressed ``.npz``, complete or not there at all."""
        content = io.BytesIO()
        np.savez_compressed(
            content,
            format=FORMAT,
            expert_ids=self.expert_ids_SLHBTK,
            refreshed=np.packbits(self.refreshed_SLHBTK),
            blocks=np.array(self.blocks),
            num_experts=self.num_experts,
            row_bytes=self.row_bytes,
            keeps_branches=self.keeps_branches,
            source=self.source,
        )
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content.getvalue())
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> "RoutingTrace":
        """Raises UserError for a file that is missing or no trace."""
        if not path.is_file():
            raise UserError(f"the routing trace {path} does not exist: record it with `moeca trace`")
        try:
            with np.load(path) as stored:
                if int(stored["format"]) != FORMAT:
                    raise ValueError(f"format {int(stored['format'])}")
                ids = stored["expert_ids"]
                refreshed = np.unpackbits(stored["refreshed"], count=ids.size).astype(bool).reshape(ids.shape)
                blocks = tuple(int(block) for block in stored["blocks"])
                sizes = int(stored["num_experts"]), int(stored["row_bytes"])
                return cls(ids, refreshed, blocks, *sizes, bool(stored["keeps_branches"]), str(stored["source"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{path} is no routing trace ({error}): record it with `moeca trace`") from error
