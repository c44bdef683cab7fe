"""What the receivers of coded rows hold, which senders hold too: for one batch of images, and never longer.

A reference is the last decoded row of one (block, leg, token, owner). It lies at the home of the token and at the
owner, and both change it in the same exchanges, by the same arithmetic: they are the same bit for bit. In one exchange
every pair of a token and an owner has one row at most. Only rows to other ranks have references.

Tokens are known by their slots: their places among all tokens of the rank's batch, of both guidance halves. So steps
that evaluate one half, some images or some tokens find the references of these, and halves never share.

Shape suffixes: T tokens of an evaluation, N rows, M pairs of this rank's tokens, P ranks of the group, D hidden size,
W bytes of a coded row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moeca_dist.kernels.int8_rows import RowFormat
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import HeldRows


class References:
    """One side's references of one leg: [num_rows, D], made with the first rows."""

    def __init__(self, form: RowFormat, num_rows: int) -> None:
        self._form = form
        self._num_rows = num_rows
        self.rows_ND: Tensor | None = None

    def encode(self, rows_ND: Tensor, key_N: Tensor) -> Tensor:
        """uint8 [N, W]; the references of ``key_N``, each of which comes once, become what the receiver decodes."""
        held = self._held(key_N, rows_ND.shape[1], rows_ND.dtype)
        return kernels_for(rows_ND.device).encode_rows(rows_ND, held, self._form)

    def decode(self, coded_NW: Tensor, key_N: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """[N, ``width``] in ``dtype``: the rows, and from now on the references of ``key_N``."""
        held = self._held(key_N, width, dtype)
        return kernels_for(coded_NW.device).decode_rows(coded_NW, held, self._form, width, dtype)

    @property
    def num_bytes(self) -> int:
        return 0 if self.rows_ND is None else self.rows_ND.numel() * self.rows_ND.element_size()

    def _held(self, key_N: Tensor, width: int, dtype: torch.dtype) -> HeldRows:
        if self.rows_ND is None:
            # Against zeros no change is smaller than the row: the first row of a pair goes by itself.
            self.rows_ND = torch.zeros(self._num_rows, width, dtype=dtype, device=key_N.device)
        return HeldRows(self.rows_ND, key_N)


@dataclass(frozen=True)
class Places:
    """Where the references of a token lie.

    ``tokens``: how many slots each rank of the group has. ``at_home_P``, ``at_owner_P``: where this rank's slots begin
    among its own references for each owner, and among those that this owner has; moot for the rank itself.
    """

    form: RowFormat
    rank: int
    tokens: tuple[int, ...]
    tokens_per_image: int
    at_home_P: Tensor
    at_owner_P: Tensor

    @classmethod
    def of(
        cls, form: RowFormat, rank: int, images: Sequence[int], tokens_per_image: int, device: torch.device
    ) -> "Places":
        """``images``: of the network's batch, both halves, on each rank."""
        tokens = tuple(count * tokens_per_image for count in images)
        ranks = range(len(tokens))
        at_home = [(owner - (owner > rank)) * tokens[rank] for owner in ranks]
        at_owner = [sum(tokens[home] for home in range(rank) if home != owner) for owner in ranks]
        return cls(
            form,
            rank,
            tokens,
            tokens_per_image,
            torch.tensor(at_home, device=device),
            torch.tensor(at_owner, device=device),
        )

    @property
    def num_at_home(self) -> int:
        return (len(self.tokens) - 1) * self.tokens[self.rank]

    @property
    def num_at_owner(self) -> int:
        return sum(self.tokens) - self.tokens[self.rank]

    def slots(self, images: slice | Tensor) -> Tensor | None:
        """int64 [T]: the slots of all tokens of some images; None for all images."""
        device, per_image = self.at_home_P.device, self.tokens_per_image
        if not isinstance(images, slice):
            return (images[:, None] * per_image + torch.arange(per_image, device=device)).flatten()
        if images == slice(None):
            return None
        return torch.arange(images.start * per_image, images.stop * per_image, device=device)


class BlockReferences:
    """Of one block: ``hidden`` rows go from home to owner, ``sums`` back; this rank is a home and an owner."""

    def __init__(self, places: Places) -> None:
        form, at_home, at_owner = places.form, places.num_at_home, places.num_at_owner
        self.hidden_at_home = References(form, at_home)
        self.hidden_at_owner = References(form, at_owner)
        self.sums_at_home = References(form, at_home)
        self.sums_at_owner = References(form, at_owner)

    @property
    def num_bytes(self) -> int:
        legs = (self.hidden_at_home, self.hidden_at_owner, self.sums_at_home, self.sums_at_owner)
        return sum(references.num_bytes for references in legs)


@dataclass(frozen=True)
class BlockCoding:
    """How one block's rows are coded in one evaluation; ``slot_T`` of its tokens, None: all of the batch in order."""

    places: Places
    references: BlockReferences
    slot_T: Tensor | None = None

    @property
    def form(self) -> RowFormat:
        return self.places.form

    def of_images(self, images: slice | Tensor) -> "BlockCoding":
        """For the tokens of some images of the batch, a slice or int64 indices; where it is for all of them now."""
        return self.of_tokens(self.places.slots(images))

    def of_tokens(self, slot_T: Tensor | None) -> "BlockCoding":
        assert self.slot_T is None
        return replace(self, slot_T=slot_T)

    def home_keys(self, token_M: Tensor, owner_M: Tensor) -> Tensor:
        """int64 [M]: where references of this rank's pairs with *other* owners lie here."""
        return self.places.at_home_P.index_select(0, owner_M) + self._slots(token_M)

    def owner_keys(self, token_M: Tensor, owner_M: Tensor) -> Tensor:
        """int32 [M]: where they lie at their owners, which are told."""
        return (self.places.at_owner_P.index_select(0, owner_M) + self._slots(token_M)).to(torch.int32)

    def _slots(self, token_M: Tensor) -> Tensor:
        return token_M if self.slot_T is None else self.slot_T.index_select(0, token_M)


@dataclass(frozen=True)
class RowCoding:
    """How one batch's rows are coded, with the references of all its blocks; freed with the batch.

    ``slot_T``: as in ``BlockCoding``.
    """

    places: Places
    blocks: dict[int, BlockReferences] = field(default_factory=dict)
    slot_T: Tensor | None = None

    def of_images(self, images: slice | Tensor) -> "RowCoding":
        """For an evaluation of some of the images, a slice or int64 indices."""
        slot_T = self.places.slots(images)
        if self.slot_T is not None:
            slot_T = self.slot_T if slot_T is None else self.slot_T.index_select(0, slot_T)
        return replace(self, slot_T=slot_T)

    def block(self, index: int) -> BlockCoding:
        if index not in self.blocks:
            self.blocks[index] = BlockReferences(self.places)
        return BlockCoding(self.places, self.blocks[index], self.slot_T)

    @property
    def num_bytes(self) -> int:
        """Of the references on this rank."""
        return sum(references.num_bytes for references in self.blocks.values())
