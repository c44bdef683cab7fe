"""What a schedule is worth, without an evaluation of the network: the calibrated run, open loop.

At a full step the half's output is the recorded exact one, in between it is the polynomial through the last recorded
ones; guidance, fitted corrections and the solver run as in a real run (``calibration/fit.py``). What is left out is
that a real run's full steps see a state that has drifted, and that a policy may forecast better or worse than the
polynomial, so the proxy is optimistic; it ranks schedules, and real runs confirm them.

All steps' terms except the state are known before the first step, so S schedules are scored together.

Shape suffixes: S schedules, H guidance halves, N steps, A ages (newest first), K terms, B images, R and Q coordinates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_dist.calibration.correction import DEFAULT_HISTORY, num_terms
from moeca_dist.calibration.fit import RIDGE
from moeca_dist.evaluation.paired import psnr_db
from moeca_dist.sampling.sampler import Gains
from moeca_dist.tuning.schedules import Schedule, as_mask
from moeca_dist.tuning.trajectories import Profile

# Schedules scored at a time: enough to fill the small matrix products, as far as 128 MiB hold their terms.
CHUNK, CHUNK_VALUES = 64, 2**24


class Proxy:
    """Scores schedules against one profile."""

    def __init__(self, profile: Profile, gains: Gains, order: int = 1) -> None:
        self.profile = profile
        self.order = order
        self._gains = [gains(index, profile.num_steps) for index in range(profile.num_steps)]
        self._outputs_NR = profile.outputs_NR

    def psnr_db(self, schedules: Sequence[Schedule]) -> Tensor:
        """float64 [S, B]: each image's PSNR for a range of two, as that of samples in [-1, 1]."""
        profile = self.profile
        terms = num_terms(profile.num_halves, DEFAULT_HISTORY) * profile.states_NR.numel()
        chunk = max(1, min(CHUNK, CHUNK_VALUES // terms))
        parts = [schedules[start : start + chunk] for start in range(0, len(schedules), chunk)]
        return torch.cat([self._chunk(as_mask(part, profile.num_steps)) for part in parts])

    def mean_db(self, schedules: Sequence[Schedule]) -> list[float]:
        return self.psnr_db(schedules).mean(1).tolist()

    def _chunk(self, full_SHN: Tensor) -> Tensor:
        profile = self.profile
        terms_SNKR = self._terms(full_SHN)
        now_SHNR = terms_SNKR[:, :, :: DEFAULT_HISTORY + 2].transpose(1, 2)
        guided_SNR = now_SHNR[:, 0]
        if profile.num_halves == 2:
            guided_SNR = now_SHNR[:, 1] + profile.guidance_scale * (now_SHNR[:, 0] - now_SHNR[:, 1])
        drift_SR = torch.zeros_like(guided_SNR[:, 0])
        for index, (of_state, of_output) in enumerate(self._gains):
            state_SR = profile.states_NR[index] + drift_SR
            terms_SKR = torch.cat([terms_SNKR[:, index], state_SR[:, None]], dim=1)
            guided_SR = guided_SNR[:, index]
            target_SR = self._outputs_NR[index] - of_state / of_output * drift_SR
            weights_SK = _least_squares(terms_SKR, target_SR - guided_SR)
            out_SR = guided_SR + (weights_SK[:, None] @ terms_SKR)[:, 0]
            drift_SR = of_state * drift_SR + of_output * (out_SR - self._outputs_NR[index])
        energy_SB = torch.einsum("sr,brq,sq->sb", drift_SR, profile.share_BRR, drift_SR)
        # A range of two: samples in [-1, 1] are halved to images in [0, 1].
        return psnr_db(energy_SB.clamp(min=0) / profile.values_per_image / 4)

    def _terms(self, full_SHN: Tensor) -> Tensor:
        """The terms of ``OutputMemory`` for all steps, [S, N, K, R], without the state; zero where one is missing."""
        recorded_HNR = self.profile.halves_HNR
        last_SHNA = _last_full(full_SHN, max(DEFAULT_HISTORY, self.order + 1))
        terms = []
        for half, recorded_NR in enumerate(recorded_HNR):
            full_SN, last_SNA = full_SHN[:, half], last_SHNA[:, half]
            past_SNAR = recorded_NR[last_SNA.clamp(min=0)] * (last_SNA >= 0)[..., None]
            weights_SNA = _polynomial(last_SNA, self.order)
            forecast_SNR = (weights_SNA[..., None] * past_SNAR).sum(2)
            now_SNR = torch.where(full_SN[..., None], recorded_NR, forecast_SNR)
            so_far_SNR = (now_SNR * ~full_SN[..., None]).cumsum(1)
            # Steps between the last full one and this one were all served: a difference of running sums.
            before = last_SNA[..., :1].clamp(min=0).expand(-1, -1, now_SNR.shape[2])
            served_SNR = (so_far_SNR - so_far_SNR.gather(1, before)) * full_SN[..., None]
            terms += [now_SNR, *past_SNAR[:, :, :DEFAULT_HISTORY].unbind(2), served_SNR]
        return torch.stack(terms, dim=2)


def _last_full(full_SHN: Tensor, count: int) -> Tensor:
    """int64 [S, H, N, A]: the ``count`` last full steps before each step, newest first; -1 where there are none."""
    num_schedules, num_halves, num_steps = full_SHN.shape
    last_SHNA = torch.full((num_schedules, num_halves, num_steps, count), -1)
    for index in range(1, num_steps):
        before_SHA = last_SHNA[:, :, index - 1]
        newer_SHA = torch.cat([torch.full_like(before_SHA[..., :1], index - 1), before_SHA[..., :-1]], dim=-1)
        last_SHNA[:, :, index] = torch.where(full_SHN[:, :, index - 1, None], newer_SHA, before_SHA)
    return last_SHNA


def _polynomial(last_SNA: Tensor, order: int) -> Tensor:
    """Lagrange weights [S, N, A] of the polynomial through the last ``order + 1`` full steps, or as many as exist."""
    used_SNA = (last_SNA >= 0) & (torch.arange(last_SNA.shape[-1]) <= order)
    now_N1 = torch.arange(last_SNA.shape[1])[:, None]
    weights_SNA = used_SNA.double()
    for other in range(order + 1):
        ahead_SN1 = (now_N1 - last_SNA[..., other : other + 1]).double()
        apart_SNA = (last_SNA - last_SNA[..., other : other + 1]).double()
        counts_SNA = used_SNA & used_SNA[..., other : other + 1] & (apart_SNA != 0)
        weights_SNA = torch.where(counts_SNA, weights_SNA * ahead_SN1 / apart_SNA.where(apart_SNA != 0, 1), weights_SNA)
    return weights_SNA


def _least_squares(terms_SKR: Tensor, residual_SR: Tensor) -> Tensor:
    """Weights [S, K] as ``sampling.fit.least_squares`` finds them; nothing for terms that are zero."""
    gram_SKK = terms_SKR @ terms_SKR.transpose(1, 2)
    right_SK1 = terms_SKR @ residual_SR[..., None]
    energy_SK = gram_SKK.diagonal(dim1=1, dim2=2)
    ridge_SK = torch.where(energy_SK > 0, RIDGE * energy_SK, 1.0)
    return torch.linalg.solve(gram_SKK + torch.diag_embed(ridge_SK), right_SK1)[..., 0]
