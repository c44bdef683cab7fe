"""One block in one step with a cache: what is computed for all tokens, for some rows, or not at all.

Where attention is kept in step with the branches (MoECa, arXiv 2606.15615), the router runs on the input made with the
stored attention output; tokens that refresh a branch then get fresh attention rows, and their branches, shared expert
and the dense blocks that follow see the input made with these.

Shape suffixes: B images, T tokens of one image, D hidden size, N rows: chosen tokens, H heads, C channels of a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moeca_dist.cache.block import BlockStep
from moeca_dist.cache.rows import Rows
from moeca_dist.kernels.select import kernels_for
from moeca_dist.models.attention import Attention, RotaryTable, merge_heads, mix
from moeca_dist.models.modulation import Modulation, empty_stream
from moeca_dist.moe.layer import MoELayer
from moeca_dist.timing import Section


@dataclass(frozen=True)
class CachedBlock:
    attention: Attention
    feed_forward: nn.Module
    modulation: Modulation
    rotary: RotaryTable | None
    cache: BlockStep

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; the argument is left as it is."""
        if self.cache.only_forecasts:
            return self._forecast(x_BTD)
        attended_BTD = self.cache.serve("attention", x_BTD, lambda images: self._attend(x_BTD, images))
        if isinstance(self.feed_forward, MoELayer) and self.cache.per_branch:
            after_BTD, entering_BTD = self.modulation.enter_feed_forward(x_BTD, attended_BTD)
            with self.cache.timer.section("experts"):
                fed_BTD = self._branches(self.feed_forward, x_BTD, attended_BTD, after_BTD, entering_BTD)
            return self.modulation.after_feed_forward(after_BTD, fed_BTD)
        after_BTD = self.modulation.after_attention(x_BTD, attended_BTD)
        if not isinstance(self.feed_forward, MoELayer):
            fed_BTD = self._dense(x_BTD, attended_BTD, after_BTD)
        else:
            fed_BTD = self._module("moe", after_BTD)
        return self.modulation.after_feed_forward(after_BTD, fed_BTD)

    def _forecast(self, x_BTD: Tensor) -> Tensor:
        """A step that computes nothing but branches: forecasts are added to the residual stream unmaterialised."""
        after_BTD, cache = empty_stream(x_BTD), self.cache
        if isinstance(self.feed_forward, MoELayer) and cache.per_branch:
            entering_BTD = empty_stream(x_BTD)
            with cache.timer.section("bookkeeping"):
                for images, attended in cache.forecasts("attention"):
                    self.modulation.at(images).forecast_into_feed_forward(
                        x_BTD[images], attended, after_BTD[images], entering_BTD[images]
                    )
            with cache.timer.section("experts"):
                fed_BTD = self.feed_forward(entering_BTD, cache)
            return self.modulation.after_feed_forward(after_BTD, fed_BTD)
        name = "moe" if isinstance(self.feed_forward, MoELayer) else "dense"
        kernels = kernels_for(x_BTD.device)
        with cache.timer.section("bookkeeping"):
            for images, attended in cache.forecasts("attention"):
                gate_BD = self.modulation.gate_attention_BD[images]
                kernels.gated_residual(x_BTD[images], gate_BD, attended, after_BTD[images])
            out_BTD = empty_stream(x_BTD)
            for images, fed in cache.forecasts(name):
                gate_BD = self.modulation.gate_feed_forward_BD[images]
                kernels.gated_residual(after_BTD[images], gate_BD, fed, out_BTD[images])
        return out_BTD

    def _attend(self, x_BTD: Tensor, images: slice) -> Tensor:
        with self.cache.timer.section("attention"):
            q, k, v = self.attention.project(self.modulation.at(images).to_attention(x_BTD[images]), self.rotary)
            self.cache.store_keys_values(images, k, v)
            return self.attention.attend(q, k, v)

    def _branches(
        self, layer: MoELayer, x_BTD: Tensor, attended_BTD: Tensor, after_BTD: Tensor, entering_BTD: Tensor
    ) -> Tensor:
        plan = layer.decide(entering_BTD, self.cache)
        rows = None
        if self.cache.policy.attention_sync and not self.cache.all_full:
            rows = plan.refreshed_rows()
            self.cache.followed.rows = rows
            entering_BTD[rows.image_N, rows.position_N] = self._synchronise(x_BTD, attended_BTD, after_BTD, rows)
        return layer.compute(entering_BTD, plan, self.cache, rows)

    def _dense(self, x_BTD: Tensor, attended_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        rows = self.cache.followed.rows
        if rows is None:
            return self._module("dense", after_BTD)
        entering_ND = self._synchronise(x_BTD, attended_BTD, after_BTD, rows)
        fed_BTD = self._module("dense", after_BTD)
        with self.cache.timer.section("dense"):
            fresh_ND = self.feed_forward(entering_ND)
        self.cache.refresh_rows("dense", fed_BTD, rows, fresh_ND)
        return fed_BTD

    def _module(self, name: Literal["dense", "moe"], after_BTD: Tensor) -> Tensor:
        """The feed-forward as one module, whole images or the rows that the policy chooses."""
        section: Section = "experts" if name == "moe" else "dense"

        def whole(images: slice) -> Tensor:
            with self.cache.timer.section(section):
                return self.feed_forward(self.modulation.at(images).to_feed_forward(after_BTD[images]))

        def chosen(rows: Rows) -> Tensor:
            after_N1D = after_BTD[rows.image_N, rows.position_N][:, None]
            with self.cache.timer.section(section):
                return self.feed_forward(self.modulation.at(rows.image_N).to_feed_forward(after_N1D)).squeeze(1)

        if self.cache.policy.refreshes_rows and not self.cache.all_full:
            return self.cache.serve_chosen(name, after_BTD, chosen)
        return self.cache.serve(name, after_BTD, whole)

    def _synchronise(self, x_BTD: Tensor, attended_BTD: Tensor, after_BTD: Tensor, rows: Rows) -> Tensor:
        """Refresh attention for ``rows``, in its cache, its output and the residual stream.

        Returns the rows' inputs to the feed-forward [N, D].
        """
        modulation = self.modulation.at(rows.image_N)
        x_N1D = x_BTD[rows.image_N, rows.position_N][:, None]
        with self.cache.timer.section("attention"):
            fresh_ND = self._attend_rows(modulation.to_attention(x_N1D).squeeze(1), rows)
        self.cache.refresh_rows("attention", attended_BTD, rows, fresh_ND)
        after_N1D = modulation.after_attention(x_N1D, fresh_ND[:, None])
        after_BTD[rows.image_N, rows.position_N] = after_N1D.squeeze(1)
        return modulation.to_feed_forward(after_N1D).squeeze(1)

    def _attend_rows(self, entering_ND: Tensor, rows: Rows) -> Tensor:
        """Fresh queries, keys and values of ``rows`` against the stored keys and values of all other tokens."""
        rotary = None if self.rotary is None else self.rotary.at(rows.position_N)
        q_HNC, k_HNC, v_HNC = (rows_1HNC[0] for rows_1HNC in self.attention.project(entering_ND[None], rotary))
        mixed = [entering_ND[:0]]
        for index, segment in enumerate(self.cache.segments):
            if segment.full:
                continue
            window, mine = rows.within(segment.images)
            fresh = k_HNC[:, window], v_HNC[:, window]
            keys_BHTC, values_BHTC = self.cache.refresh_keys_values(index, mine, *fresh)
            # Image by image: the numbers of rows differ, and padding would be computed.
            counts = torch.bincount(mine.image_N, minlength=keys_BHTC.shape[0]).tolist()
            for image, q_1HNC in enumerate(q_HNC[None, :, window].split(counts, dim=2)):
                if counts[image]:
                    here = slice(image, image + 1)
                    mixed.append(merge_heads(mix(q_1HNC, keys_BHTC[here], values_BHTC[here]))[0])
        return self.attention.output(torch.cat(mixed))
