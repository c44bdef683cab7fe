"""Classifier-free guidance: one batch of two halves, conditional first, and only the guided channels mixed."""

import pytest
import torch

from moeca_dist.sampling.guidance import exact, guided
from moeca_dist.types import StepContext

STEP = StepContext(index=3, num_steps=9, time=0.25)
NULL = 10
LABELS = torch.tensor([2, 5, 0])


class RecordingNetwork:
    """``output = [x + label, x * t]``: rows are independent, so halves can be computed one by one as well."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_NCHW, t_N, y_N, step, /):
        self.calls.append((x_NCHW, t_N, y_N, step))
        return torch.cat([x_NCHW + y_N[:, None, None, None], x_NCHW * (y_N - t_N)[:, None, None, None]], dim=1)


def _inputs(batch=3):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 6, 6, generator=draw), torch.full((batch,), STEP.time)


@pytest.mark.parametrize("guided_channels", [3, 4])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 7.0])
def test_guided_channels_are_mixed_and_the_rest_is_conditional(guided_channels, cfg_scale):
    x_BCHW, t_B = _inputs()
    network = RecordingNetwork()
    denoise = guided(network, LABELS, cfg_scale=cfg_scale, null_label=NULL, guided_channels=guided_channels)
    output = denoise(x_BCHW, t_B, STEP)

    alone = RecordingNetwork()
    conditional = alone(x_BCHW, t_B, LABELS, STEP)
    unconditional = alone(x_BCHW, t_B, torch.full_like(LABELS, NULL), STEP)
    expected = conditional.clone()
    for channel in range(guided_channels):
        mixed = cfg_scale * conditional[:, channel] + (1 - cfg_scale) * unconditional[:, channel]
        expected[:, channel] = mixed
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    assert torch.equal(output[:, guided_channels:], conditional[:, guided_channels:])


def test_one_call_holds_both_halves_conditional_first():
    x_BCHW, t_B = _inputs()
    network = RecordingNetwork()
    guided(network, LABELS, cfg_scale=2.0, null_label=NULL, guided_channels=4)(x_BCHW, t_B, STEP)
    ((x_NCHW, t_N, y_N, step),) = network.calls
    assert torch.equal(x_NCHW, torch.cat([x_BCHW, x_BCHW])) and torch.equal(t_N, torch.cat([t_B, t_B]))
    assert y_N.tolist() == [2, 5, 0, NULL, NULL, NULL]
    assert step is STEP


def test_scale_one_computes_the_conditional_half_only():
    x_BCHW, t_B = _inputs()
    network = RecordingNetwork()
    output = guided(network, LABELS, cfg_scale=1.0, null_label=NULL, guided_channels=4)(x_BCHW, t_B, STEP)
    ((x_NCHW, _, y_N, step),) = network.calls
    assert torch.equal(x_NCHW, x_BCHW) and torch.equal(y_N, LABELS) and step is STEP
    assert torch.equal(output, RecordingNetwork()(x_BCHW, t_B, LABELS, STEP))


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_without_images_the_network_is_still_called(cfg_scale):
    x_BCHW, t_B = _inputs(batch=0)
    network = RecordingNetwork()
    output = guided(network, LABELS[:0], cfg_scale=cfg_scale, null_label=NULL, guided_channels=4)(x_BCHW, t_B, STEP)
    assert len(network.calls) == 1 and output.shape == (0, 8, 6, 6)


def test_exact_hands_everything_but_the_step_to_the_model():
    x_BCHW, t_B = _inputs()
    output = exact(lambda x, t, y: x + t[:, None, None, None] + y[:, None, None, None])(x_BCHW, t_B, LABELS, STEP)
    assert torch.equal(output, x_BCHW + t_B[:, None, None, None] + LABELS[:, None, None, None])
