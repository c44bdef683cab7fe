"""The published sampler of every published network, and the shared rules of drawing a batch."""

from dataclasses import replace

import pytest
import torch

from moeca_dist.errors import UserError
from moeca_dist.models.registry import FAMILIES, published_spec
from moeca_dist.models.spec import TimeConvention
from moeca_dist.sampling import ddpm, flow
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request

SMALL = {
    "dsmoe": replace(published_spec("DSMoE-S-E16"), input_size=8, num_classes=10),
    "xl": replace(published_spec("DiT-MoE-XL-8E2A"), input_size=8, num_classes=10),
    "s": replace(published_spec("DiT-MoE-S-8E2A"), input_size=8, num_classes=10),
}
REQUESTS = [Request(index=index, label=index % 10, seed=1) for index in (5, 0, 13)]


class LabelNetwork:
    """Twice the input channels, rows independent, dependent on label and time; counts its calls."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, x_NCHW, t_N, y_N, step, /):
        self.num_calls += 1
        pull = (0.1 * y_N + 0.001 * t_N)[:, None, None, None]
        return torch.cat([torch.tanh(x_NCHW - pull), torch.tanh(x_NCHW)], dim=1)


def test_every_published_size_gets_its_published_sampler():
    for family in FAMILIES.values():
        for name, spec in family.published.items():
            sampler = sampler_for(spec)
            if name.startswith("DSMoE"):
                expected = (flow.sample_noise_to_data, 250, 4)
            elif "XL" in name or "-G-" in name:
                expected = (flow.sample_data_to_noise, 50, 4)
            else:
                expected = (ddpm.sample, 250, 3)
            assert (sampler.solve, sampler.default_num_steps, sampler.guided_channels) == expected, name
            assert sampler.null_label == 1000 and sampler.shape_CHW == (4, 32, 32)


def test_pixel_models_guide_what_they_have():
    spec = replace(SMALL["dsmoe"], in_channels=1, out_channels=1, input_size=16)
    assert sampler_for(spec).guided_channels == 1 and sampler_for(spec).shape_CHW == (1, 16, 16)
    grey_ddpm = replace(SMALL["s"], in_channels=1, out_channels=2)
    assert sampler_for(grey_ddpm).guided_channels == 1


def test_ddpm_without_variance_channels_is_refused():
    with pytest.raises(UserError, match=r"8 output channels .* this one has 4"):
        sampler_for(replace(SMALL["s"], out_channels=4))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_an_image_is_the_same_in_any_batch(name, cfg_scale):
    sampler = sampler_for(SMALL[name])
    together = sampler.sample(LabelNetwork(), REQUESTS, cfg_scale=cfg_scale, num_steps=6)
    assert together.shape == (3, 4, 8, 8) and together.dtype == torch.float32
    for row, request in zip(together, REQUESTS, strict=True):
        alone = sampler.sample(LabelNetwork(), [request], cfg_scale=cfg_scale, num_steps=6)
        torch.testing.assert_close(alone[0], row, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_a_rank_without_images_makes_the_same_calls(name):
    sampler, counts = sampler_for(SMALL[name]), []
    for requests in (REQUESTS, []):
        network = LabelNetwork()
        samples = sampler.sample(network, requests, cfg_scale=1.5, num_steps=6)
        counts.append(network.num_calls)
        assert samples.shape == (len(requests), 4, 8, 8)
    assert counts == [6, 6]


@pytest.mark.parametrize("name", SMALL)
def test_the_published_step_count_is_the_default(name):
    sampler, network = sampler_for(SMALL[name]), LabelNetwork()
    sampler.sample(network, REQUESTS[:1], cfg_scale=1.0)
    assert network.num_calls == sampler.default_num_steps


@pytest.mark.parametrize(("name", "num_steps"), [("dsmoe", 0), ("xl", -1), ("s", 1), ("s", 1001)])
def test_step_counts_are_refused_before_any_work(name, num_steps):
    sampler, network = sampler_for(SMALL[name]), LabelNetwork()
    with pytest.raises(UserError, match=f"num_steps {num_steps} "):
        sampler.check_num_steps(num_steps)
    with pytest.raises(UserError, match=f"num_steps {num_steps} "):
        sampler.sample(network, REQUESTS, cfg_scale=1.5, num_steps=num_steps)
    assert network.num_calls == 0


def test_guidance_reaches_the_samples_and_no_gradient_does():
    sampler = sampler_for(SMALL["dsmoe"])
    plain, guided = (sampler.sample(LabelNetwork(), REQUESTS, cfg_scale=scale, num_steps=3) for scale in (1.0, 4.0))
    assert not torch.allclose(plain, guided)

    weight = torch.ones(1, requires_grad=True)
    samples = sampler.sample(lambda x, t, y, step: weight * x, REQUESTS, cfg_scale=1.0, num_steps=2)
    assert not samples.requires_grad


def test_flow_networks_sample_in_their_own_time_direction():
    spec = SMALL["dsmoe"]
    for convention, first in ((TimeConvention.FLOW_NOISE_TO_DATA, 0.0), (TimeConvention.FLOW_DATA_TO_NOISE, 1.0)):
        steps = []
        sampler_for(replace(spec, time_convention=convention)).sample(
            LabelNetwork(),
            REQUESTS,
            cfg_scale=1.5,
            num_steps=2,
            on_step=steps.append,
        )
        assert [step.time for step in steps] == [first, 0.5]
