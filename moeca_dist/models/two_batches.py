"""Blocks without a cache over two halves of the images in turns: rows of one travel while the other is computed.

Known as two-batch overlap (SGLang) or dual-batch overlap (vLLM). Every rank makes the same turns whatever images it
has, so that the collectives of both halves come in the same order everywhere.

Shape suffixes: B images, T tokens of one image, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_dist.models.attention import RotaryTable
from moeca_dist.models.blocks import AdaLNBlock
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.references import RowCoding
from moeca_dist.timing import Timer


def in_turns(
    blocks: Sequence[AdaLNBlock],
    x_BTD: Tensor,
    c_BD: Tensor,
    rotary: RotaryTable | None,
    timer: Timer,
    coding: RowCoding | None,
) -> Tensor:
    """[B, T, D] -> [B, T, D]: what the blocks give one after the other, but for rounding in smaller products.

    While a half's rows are on their way there the other half computes attention and routes, and while they are on their
    way back its experts. Where both guidance halves are evaluated each of them is one, so they are as large as each
    other on every rank.
    """
    middle = x_BTD.shape[0] // 2
    halves = [slice(0, middle), slice(middle, x_BTD.shape[0])]
    codings = [None if coding is None else coding.of_images(half) for half in halves]
    coming = [Pending.ready(x_BTD[half]) for half in halves]
    for index, block in enumerate(blocks):
        leaving = []
        for half, coded, stream in zip(halves, codings, coming, strict=True):
            here = None if coded is None else coded.block(index)
            leaving.append(block.start(stream.wait(), c_BD[half], rotary, timer, here))
        coming = [arriving.wait() for arriving in leaving]
    return torch.cat([stream.wait() for stream in coming])
