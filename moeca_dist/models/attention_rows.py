"""Attention of single tokens: fresh queries, keys and values against the stored ones of all other tokens.

Shape suffixes: D hidden size, N chosen tokens, H heads, T tokens of one image, B images, C channels of a head.
"""

import torch
from torch import Tensor

from moeca_dist.cache.module_cache import KeyValueCache, TokenIndex
from moeca_dist.models.attention import Attention, RotaryTable, merge_heads, mix


def attend_tokens(
    attention: Attention, x_ND: Tensor, tokens: TokenIndex, rotary: RotaryTable | None, kept: KeyValueCache
) -> Tensor:
    """Return attention outputs [N, D] of ``tokens``, whose keys and values in ``kept`` become the fresh ones."""
    at_tokens = None if rotary is None else rotary.at(tokens.position_N)
    q_HNC, k_HNC, v_HNC = (each_1HNC[0] for each_1HNC in attention.project(x_ND[None], at_tokens))
    keys_BHTC, values_BHTC = kept.refresh(tokens, k_HNC, v_HNC)
    # NOTE: a host synchronisation on CUDA. Images come one by one: their numbers of tokens differ.
    counts_B = torch.bincount(tokens.image_N, minlength=keys_BHTC.shape[0]).tolist()
    mixed = [x_ND[:0]]
    for image, q_1HNC in enumerate(q_HNC[None].split(counts_B, dim=2)):
        if counts_B[image]:
            here = slice(image, image + 1)
            mixed.append(merge_heads(mix(q_1HNC, keys_BHTC[here], values_BHTC[here]))[0])
    return attention.output(torch.cat(mixed))
