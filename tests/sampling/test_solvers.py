"""Solvers against the papers' formulas in plain loops, and against cases that have a known answer."""

import math

import pytest
import torch

from moeca_dist.errors import UserError
from moeca_dist.sampling import ddpm, flow
from moeca_dist.sampling.noise import NoiseSource
from moeca_dist.types import Request, StepContext

SHAPE = (2, 4, 4)
FLOWS = {"noise_to_data": flow.sample_noise_to_data, "data_to_noise": flow.sample_data_to_noise}
SOLVERS = FLOWS | {"ddpm": ddpm.sample}


def noise_of(count, seed=0):
    return NoiseSource([Request(index=index, label=0, seed=seed) for index in range(count)])


def wavy(x_BCHW, t_B, step):
    """A bounded, time-dependent stand-in for a network with variance channels."""
    time = t_B[:, None, None, None] * 0.01
    return torch.cat([torch.sin(x_BCHW + time), torch.cos(3 * x_BCHW - time)], dim=1)


# ---- rectified flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_euler_towards_data_follows_the_loop(num_steps):
    z = noise_of(3).draw(SHAPE).double()
    for i in range(num_steps):
        t = i / num_steps
        z = z + torch.sin(z + t * 0.01) / num_steps
    result = flow.sample_noise_to_data(wavy, noise_of(3), SHAPE, num_steps)
    torch.testing.assert_close(result, z.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_euler_from_noise_at_one_follows_the_loop(num_steps):
    z = noise_of(3).draw(SHAPE).double()
    for i in range(num_steps, 0, -1):
        t = i / num_steps
        z = z - torch.sin(z + t * 0.01) / num_steps
    result = flow.sample_data_to_noise(wavy, noise_of(3), SHAPE, num_steps)
    torch.testing.assert_close(result, z.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 5, 50])
def test_a_straight_path_needs_one_step_and_keeps_its_end_with_many(num_steps):
    target = torch.linspace(-1, 1, 32).reshape(1, *SHAPE)
    start = noise_of(1).draw(SHAPE)
    ends = [
        flow.sample_noise_to_data(lambda x, t, step: target - start, noise_of(1), SHAPE, num_steps),
        flow.sample_data_to_noise(lambda x, t, step: start - target, noise_of(1), SHAPE, num_steps),
    ]
    for end in ends:
        torch.testing.assert_close(end, target, atol=1e-5, rtol=0)


def test_the_state_stays_float32_under_a_half_precision_network():
    seen = []

    def half_network(x_BCHW, t_B, step):
        seen.extend((x_BCHW.dtype, t_B.dtype))
        return torch.ones_like(x_BCHW, dtype=torch.bfloat16)

    result = flow.sample_noise_to_data(half_network, noise_of(1), SHAPE, 250)
    assert set(seen) == {torch.float32}
    # In bfloat16 a step of 1/250 would be off by 0.1%, and too small to be added at all above 1.
    torch.testing.assert_close(result, noise_of(1).draw(SHAPE) + 1, atol=2e-5, rtol=0)


# ---- DDPM -----------------------------------------------------------------------------------------------------------


def naive_chain(timesteps):
    """Per kept timestep: alpha-bar, the previous one, and the beta between them, by plain products."""
    alpha_bar, products = 1.0, []
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        products.append(alpha_bar)
    previous, chain = 1.0, []
    for t in timesteps:
        chain.append((products[t], previous, 1 - products[t] / previous))
        previous = products[t]
    return chain


def naive_posterior(output, x, chain, entry):
    """DDPM eqs. 6, 7 and 15 of Improved DDPM, solved for x_0 by DDPM eq. 4; everything in float64."""
    epsilon, v = output.double().chunk(2, dim=1)
    alpha_bar, alpha_bar_prev, beta = chain[entry]
    x0 = (x.double() - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
    mean = (
        math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x0
        + math.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x.double()
    )
    at = max(entry, 1)  # the first beta-tilde is zero; the published code borrows its neighbour's
    beta_tilde = chain[at][2] * (1 - chain[at][1]) / (1 - chain[at][0])
    share = (v + 1) / 2
    return mean, share * math.log(beta) + (1 - share) * math.log(beta_tilde)


@pytest.mark.parametrize("num_steps", [2, 25, 250, 1000])
def test_posterior_matches_the_papers(num_steps):
    diffusion = ddpm.RespacedDiffusion.of(num_steps)
    chain = naive_chain(diffusion.timesteps)
    draw = torch.Generator().manual_seed(num_steps)
    x_BCHW = torch.randn(2, *SHAPE, generator=draw)
    output_BCHW = torch.rand(2, 4, 4, 4, generator=draw) * 2 - 1
    for entry in sorted({0, 1, num_steps // 2, num_steps - 1}):
        found = diffusion.posterior(output_BCHW, x_BCHW, entry)
        for ours, expected in zip(found, naive_posterior(output_BCHW, x_BCHW, chain, entry), strict=True):
            torch.testing.assert_close(ours, expected.float(), atol=2e-5, rtol=1e-5)


def test_ancestral_sampling_follows_the_loop():
    num_steps, source = 6, noise_of(3)
    timesteps = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
    chain = naive_chain(timesteps)
    x = source.draw(SHAPE).double()
    for entry in range(num_steps - 1, -1, -1):
        t_B = torch.full((3,), float(timesteps[entry]))
        mean, log_variance = naive_posterior(wavy(x, t_B, None), x, chain, entry)
        z = source.draw(SHAPE).double() if entry else 0
        x = mean + torch.exp(log_variance / 2) * z
    result = ddpm.sample(wavy, noise_of(3), SHAPE, num_steps)
    torch.testing.assert_close(result, x.float(), atol=1e-4, rtol=1e-5)


def test_unrespaced_chain_is_the_linear_schedule():
    diffusion = ddpm.RespacedDiffusion.of(1000)
    assert diffusion.timesteps == tuple(range(1000))
    betas = torch.from_numpy(diffusion.log_betas_S).exp()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), atol=1e-12, rtol=0)


def test_respaced_timesteps_spread_over_the_whole_range():
    assert ddpm.respaced_timesteps(2) == [0, 999]
    assert ddpm.respaced_timesteps(4) == [0, 333, 666, 999]
    for num_steps in range(2, 1001):
        timesteps = ddpm.respaced_timesteps(num_steps)
        assert len(set(timesteps)) == num_steps and timesteps[0] == 0 and timesteps[-1] == 999
        assert all(abs(t - i * 999 / (num_steps - 1)) <= 0.5 + 1e-9 for i, t in enumerate(timesteps))


def test_respaced_timesteps_at_a_tie_fall_as_published():
    # 10 * 49.95 is 499.5, which rounds to the even 500; ten additions of 49.95 end just below it.
    assert ddpm.respaced_timesteps(21)[9:12] == [450, 499, 549]


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 1001])
def test_impossible_ddpm_step_counts_are_refused(num_steps):
    with pytest.raises(UserError, match=rf"num_steps {num_steps} .*2\.\.1000"):
        ddpm.sample(wavy, noise_of(1), SHAPE, num_steps)


@pytest.mark.parametrize("solve", FLOWS.values(), ids=FLOWS.keys())
@pytest.mark.parametrize("num_steps", [-3, 0])
def test_impossible_euler_step_counts_are_refused(solve, num_steps):
    with pytest.raises(UserError, match=f"num_steps {num_steps} .*at least 1"):
        solve(wavy, noise_of(1), SHAPE, num_steps)


# ---- a distribution with a known answer: pixels drawn from N(MEAN, STD^2) ------------------------------------------

MEAN, STD = 0.7, 0.3


def ideal_velocity(x_BCHW, t):
    """E[data - noise | x_t] of rectified flow when x_t = t * data + (1 - t) * noise."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x_BCHW - t * MEAN)


def ideal_epsilon(x_BCHW, alpha_bar):
    """E[noise | x_t] of DDPM when x_t = sqrt(alpha_bar) * data + sqrt(1 - alpha_bar) * noise."""
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return math.sqrt(1 - alpha_bar) / variance * (x_BCHW - math.sqrt(alpha_bar) * MEAN)


def perfect_network(name):
    alpha_bars = [entry[0] for entry in naive_chain(range(1000))]

    def network(x_BCHW, t_B, step):
        if name == "noise_to_data":
            return ideal_velocity(x_BCHW, step.time)
        if name == "data_to_noise":
            return -ideal_velocity(x_BCHW, 1 - step.time)
        # Variance at the lower end of the range, where it is the posterior's own.
        return torch.cat([ideal_epsilon(x_BCHW, alpha_bars[int(step.time)]), -torch.ones_like(x_BCHW)], dim=1)

    return network


@pytest.mark.parametrize("name", SOLVERS)
def test_a_perfect_network_yields_the_data_distribution(name):
    samples = SOLVERS[name](perfect_network(name), noise_of(4), (1, 48, 48), 250)
    assert abs(samples.mean().item() - MEAN) < 0.015
    assert abs(samples.std().item() - STD) < 0.02


# ---- what all solvers share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("batch", [0, 3])
def test_every_step_is_announced_and_evaluated_once(solve, batch):
    evaluated, finished = [], []

    def network(x_BCHW, t_B, step):
        assert x_BCHW.shape == (batch, *SHAPE) and t_B.shape == (batch,)
        assert all(t == torch.tensor(step.time) for t in t_B)
        assert finished == evaluated
        evaluated.append(step)
        return wavy(x_BCHW, t_B, step)

    result = solve(network, noise_of(batch), SHAPE, 5, finished.append)
    assert result.shape == (batch, *SHAPE) and result.dtype == torch.float32
    assert [(step.index, step.num_steps) for step in evaluated] == [(index, 5) for index in range(5)]
    assert finished == evaluated


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("noise_to_data", [0.0, 0.25, 0.5, 0.75]),
        ("data_to_noise", [1.0, 0.75, 0.5, 0.25]),
        ("ddpm", [999.0, 666.0, 333.0, 0.0]),
    ],
)
def test_times_run_from_noise_to_data(name, times):
    steps: list[StepContext] = []
    SOLVERS[name](wavy, noise_of(1), SHAPE, 4, steps.append)
    assert [step.time for step in steps] == times


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
def test_an_image_does_not_depend_on_its_batch(solve):
    together = solve(wavy, noise_of(4), SHAPE, 5)
    for index in range(4):
        alone = solve(wavy, NoiseSource([Request(index=index, label=0)]), SHAPE, 5)
        torch.testing.assert_close(alone[0], together[index], atol=1e-6, rtol=0)
