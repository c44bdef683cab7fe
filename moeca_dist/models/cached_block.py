"""One block in one evaluation with a cache: each output is computed and stored, or forecast.

A policy of modules treats attention and the feed-forward as wholes. A policy of branches decides inside the MoE layer.
Attention can be kept in step with the branches (MoECa, arXiv 2606.15615). The router then runs on the input made with
the stored attention output. Tokens that refresh a branch get fresh rows of attention. Their branches, the shared expert
and the dense blocks that follow see the input made with these rows.

Shape suffixes: B images, T tokens of one image, D hidden size, N chosen tokens, H heads, C channels of a head.
"""

from typing import Literal

from torch import Tensor, nn

from moeca_dist.cache.layer_cache import LayerCache
from moeca_dist.cache.module_cache import TokenIndex
from moeca_dist.cache.policy import ModulePolicy
from moeca_dist.kernels.types import Forecast
from moeca_dist.models.attention import Attention, RotaryTable
from moeca_dist.models.attention_rows import attend_tokens
from moeca_dist.models.modulation import Modulation
from moeca_dist.moe.layer import MoELayer


def attention_output(
    attention: Attention, x_BTD: Tensor, modulation: Modulation, rotary: RotaryTable | None, cache: LayerCache
) -> Forecast:
    """Return the attention output: computed and stored, or what is expected of it."""
    if not cache.computes_modules:
        return cache.forecast("attention")
    with cache.timer.section("attention"):
        q, k, v = attention.project(modulation.to_attention(x_BTD), rotary)
        attn_out_BTD = attention.attend(q, k, v)
    cache.keep("attention", attn_out_BTD)
    if cache.syncs_attention:
        cache.store.keys_values.store(k, v)
    return Forecast(attn_out_BTD)


def module_feed_forward(feed_forward: nn.Module, x_BTD: Tensor, modulation: Modulation, cache: LayerCache) -> Forecast:
    """Return the output of a feed-forward that is computed or served as a whole, or token by token (ToCa).

    ``x_BTD``: the stream after attention.
    """
    assert isinstance(cache.policy, ModulePolicy)
    name: Literal["moe", "dense"] = "moe" if isinstance(feed_forward, MoELayer) else "dense"
    section: Literal["experts", "dense"] = "experts" if name == "moe" else "dense"
    if cache.is_full:
        with cache.timer.section(section):
            out_BTD = feed_forward(modulation.to_feed_forward(x_BTD))
        cache.keep(name, out_BTD)
        return Forecast(out_BTD)
    if not cache.policy.refreshes_tokens:
        return cache.forecast(name)
    tokens = cache.tokens_to_compute(name)
    with cache.timer.section(section):
        # Tokens stand as images of one token each, because each is modulated by its own image.
        ff_in_N1D = modulation.at(tokens.image_N).to_feed_forward(tokens.of(x_BTD)[:, None])
        fresh_ND = feed_forward(ff_in_N1D).squeeze(1)
    return _with_fresh(name, tokens, fresh_ND, cache)


def branch_feed_forward(
    layer: MoELayer,
    attention: Attention,
    x_BTD: Tensor,
    attn_out: Forecast,
    modulation: Modulation,
    rotary: RotaryTable | None,
    cache: LayerCache,
) -> tuple[Tensor, TokenIndex | None]:
    """Run a block's MoE layer branch by branch.

    Returns the block's output [B, T, D], and the tokens whose rows of attention were refreshed.
    """
    x_attn_BTD, ff_in_BTD = modulation.enter_feed_forward(x_BTD, attn_out)
    with cache.timer.section("experts"):
        plan = layer.plan(ff_in_BTD, cache)
    tokens = None
    if cache.syncs_attention and not cache.is_full:
        tokens = plan.refreshed_tokens(x_BTD.shape[1])
        fresh_ND = refresh_attention(attention, x_BTD, x_attn_BTD, modulation, rotary, tokens, cache)
        ff_in_BTD[tokens.image_N, tokens.position_N] = fresh_ND
    with cache.timer.section("experts"):
        ff_out_BTD = layer.cached(ff_in_BTD, plan, cache, tokens)
    return modulation.after_feed_forward(x_attn_BTD, Forecast(ff_out_BTD)), tokens


def dense_feed_forward(
    dense: nn.Module,
    attention: Attention,
    x_BTD: Tensor,
    attn_out: Forecast,
    modulation: Modulation,
    rotary: RotaryTable | None,
    cache: LayerCache,
    tokens: TokenIndex | None,
) -> Tensor:
    """Run a dense block of a branch policy.

    Args:
        tokens: those that the MoE block before it refreshed. None if it refreshed none.
    """
    x_attn_BTD = modulation.after_attention(x_BTD, attn_out)
    if cache.computes_modules:
        with cache.timer.section("dense"):
            ff_out_BTD = dense(modulation.to_feed_forward(x_attn_BTD))
        cache.keep("dense", ff_out_BTD)
        return modulation.after_feed_forward(x_attn_BTD, Forecast(ff_out_BTD))
    if tokens is None:
        return modulation.after_feed_forward(x_attn_BTD, cache.forecast("dense"))
    ff_in_ND = refresh_attention(attention, x_BTD, x_attn_BTD, modulation, rotary, tokens, cache)
    with cache.timer.section("dense"):
        fresh_ND = dense(ff_in_ND)
    return modulation.after_feed_forward(x_attn_BTD, _with_fresh("dense", tokens, fresh_ND, cache))


def refresh_attention(
    attention: Attention,
    x_BTD: Tensor,
    x_attn_BTD: Tensor,
    modulation: Modulation,
    rotary: RotaryTable | None,
    tokens: TokenIndex,
    cache: LayerCache,
) -> Tensor:
    """Compute attention anew for ``tokens``, in its cache and in the stream ``x_attn_BTD`` after attention.

    Returns the tokens' inputs to the feed-forward [N, D].
    """
    modulation = modulation.at(tokens.image_N)
    x_N1D = tokens.of(x_BTD)[:, None]
    with cache.timer.section("attention"):
        attn_in_ND = modulation.to_attention(x_N1D).squeeze(1)
        fresh_ND = attend_tokens(attention, attn_in_ND, tokens, rotary, cache.store.keys_values)
    cache.keep_tokens("attention", tokens, fresh_ND)
    x_attn_N1D = modulation.after_attention(x_N1D, Forecast(fresh_ND[:, None]))
    x_attn_BTD[tokens.image_N, tokens.position_N] = x_attn_N1D.squeeze(1)
    return modulation.to_feed_forward(x_attn_N1D).squeeze(1)


def _with_fresh(name: Literal["moe", "dense"], tokens: TokenIndex, fresh_ND: Tensor, cache: LayerCache) -> Forecast:
    """Return the expected output of a module with the fresh rows of ``tokens`` in it, and keep these."""
    out_BTD = cache.forecast(name).sum()
    cache.keep_tokens(name, tokens, fresh_ND)
    out_BTD[tokens.image_N, tokens.position_N] = fresh_ND
    return Forecast(out_BTD)
