"""Samplers and guidance against the official implementations' values, on networks loaded from the original layout."""

import pytest
import torch
from torch import Tensor

from moeca_dist.checkpoints.load import load_model
from moeca_dist.sampling import ddpm, flow
from moeca_dist.sampling.guidance import exact, guided
from moeca_dist.sampling.noise import NoiseSource
from moeca_dist.types import StepContext
from tests.helpers.golden_files import DIT_MOE_NAMES, DSMOE_NAMES, EULER_TOLERANCE, load_golden

CHANNELS = 4


class GivenNoise(NoiseSource):
    """The golden file's starting point in place of a drawn one."""

    def __init__(self, x_BCHW: Tensor) -> None:
        super().__init__([])
        self._x_BCHW = x_BCHW

    def draw(self, shape_CHW):
        assert tuple(self._x_BCHW.shape[1:]) == tuple(shape_CHW)
        return self._x_BCHW


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Golden file and network by name, through the public loader."""
    folder = tmp_path_factory.mktemp("golden")

    def load(name):
        golden = load_golden(name)
        return golden, load_model(golden.write_checkpoint(folder / f"{name}.pt"), **golden.options, device="cpu")

    cache = {name: load(name) for name in DSMOE_NAMES + DIT_MOE_NAMES}
    return cache.__getitem__


def euler(solve, golden, model, rows, cfg_scale):
    x_BCHW, y_B = golden["x"][:rows], golden["y"][:rows]
    denoise = guided(exact(model), y_B, cfg_scale=cfg_scale, null_label=model.spec.null_label, guided_channels=CHANNELS)
    with torch.no_grad():
        return solve(denoise, GivenNoise(x_BCHW), x_BCHW.shape[1:], 4)


@pytest.mark.parametrize("name", DSMOE_NAMES)
def test_dsmoe_euler_with_guidance(loaded, name):
    golden, model = loaded(name)
    samples = euler(flow.sample_noise_to_data, golden, model, len(golden["x"]), cfg_scale=1.5)
    torch.testing.assert_close(samples, golden["euler4_cfg1_5"], atol=EULER_TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("name", DIT_MOE_NAMES)
def test_dit_moe_euler_with_guidance(loaded, name):
    golden, model = loaded(name)
    samples = euler(flow.sample_data_to_noise, golden, model, 2, cfg_scale=7.0)
    torch.testing.assert_close(samples, golden["euler4_cfg7"], atol=EULER_TOLERANCE[name], rtol=0)


def ddpm_guided(golden, model, x_BCHW, step):
    """Guided output, with the DDPM path's channel rule, for the two images whose both halves the golden file holds."""
    denoise = guided(exact(model), golden["y"][:2], cfg_scale=4.0, null_label=model.spec.null_label, guided_channels=3)
    with torch.no_grad():
        return denoise(x_BCHW, torch.full((2,), step.time), step)


def test_ddpm_guidance_leaves_the_other_channels_alone(loaded):
    golden, model = loaded("dit_moe_qkv")
    output = ddpm_guided(golden, model, golden["x"][:2], StepContext(index=0, num_steps=1, time=500.0))
    # The official output repeats the guided channels in both halves; each half keeps the other channels it computed.
    both_halves = golden["cfg4_output"]
    torch.testing.assert_close(output, both_halves[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(output[:, :3], both_halves[2:, :3], atol=1e-5, rtol=0)
    assert (output[:, 3:] - both_halves[2:, 3:]).abs().max() > 1e-3


def test_ddpm_timesteps_are_the_official_ones(loaded):
    golden, _ = loaded("dit_moe_qkv")
    assert ddpm.respaced_timesteps(25) == golden["ddpm25_timestep_map"].tolist()


def test_ddpm_posterior(loaded):
    golden, model = loaded("dit_moe_qkv")
    diffusion, entry = ddpm.RespacedDiffusion.of(25), 7
    step = StepContext(index=25 - 1 - entry, num_steps=25, time=float(diffusion.timesteps[entry]))
    x_BCHW = golden["ddpm25_x"][:2]
    mean, log_variance = diffusion.posterior(ddpm_guided(golden, model, x_BCHW, step), x_BCHW, entry)
    torch.testing.assert_close(mean, golden["ddpm25_step7_mean"][:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_variance, golden["ddpm25_step7_log_variance"][:2], atol=1e-5, rtol=0)
