"""Tuning: the proxy against the run it stands for, the search, the choice, and what becomes of both when interrupted.

Shape suffixes: H guidance halves, N steps.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeca_dist import Engine, UserError
from moeca_dist.calibration.correction import DEFAULT_HISTORY, OutputMemory
from moeca_dist.calibration.fit import Fitted
from moeca_dist.config import CacheConfig, Config, HalvesConfig
from moeca_dist.evaluation.paired import psnr_db
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.tuning.calibrate import record
from moeca_dist.tuning.candidate import Candidate, tolerance_bound
from moeca_dist.tuning.proxy import Proxy
from moeca_dist.tuning.resume import StateFile
from moeca_dist.tuning.schedules import Schedule, distance, even, neighbour, num_full
from moeca_dist.tuning.search import Search
from moeca_dist.tuning.target import Target
from moeca_dist.tuning.trajectories import make_profile
from moeca_dist.tuning.trials import Trials
from moeca_dist.tuning.tune import Settings, run_identity, tune
from moeca_dist.types import Request, StepContext
from tests.helpers.golden_files import load_golden

NUM_STEPS = 8
SCHEDULES: list[Schedule] = [((0, 1, 4), (0, 3, 6)), ((0, 2, 3, 5, 7), (0,)), ((0,), (0, 1, 2, 3, 4, 5, 6, 7))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tuning")
    sections = {}
    for name in ("dsmoe_e8", "dit_moe_qkv"):
        golden = load_golden(name)
        path = golden.write_checkpoint(folder / f"{name}.pt")
        sections[name] = {"checkpoint": str(path), "device": "cpu", **golden.options}
    return sections


def make_engine(model: dict[str, Any], **sampling: Any) -> Engine:
    """Runs on every rank of a pool, or alone."""
    sampling = {"num_steps": NUM_STEPS, "cfg_scale": 1.5, "batch_size": 4} | sampling
    config = Config.model_validate({"model": model, "sampling": sampling})
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=120)
    return Engine.from_config(config, mesh=mesh)


def requests(count: int) -> list[Request]:
    return [Request(index, index % 10, 7) for index in range(count)]


# ---- the proxy -------------------------------------------------------------------------------------------------------


def lagrange(points: list[tuple[int, torch.Tensor]], index: int) -> torch.Tensor:
    total = torch.zeros_like(points[0][1])
    for at, value in points:
        weight = 1.0
        for other, _ in points:
            if other != at:
                weight *= (index - other) / (at - other)
        total = total + weight * value
    return total


def open_loop_db(engine: Engine, schedule: Schedule, order: int) -> torch.Tensor:
    """The proxy's figures from whole tensors, one schedule and step at a time, with the classes of a real run."""
    recording = record(engine, requests(4), keep_halves=True)
    exact = recording.exact
    names = ("conditional", "unconditional")
    memory = OutputMemory(lambda step, half: step.index in schedule[names.index(half)], DEFAULT_HISTORY)
    fitted = Fitted(exact.guidance, memory, exact, engine.sampler.gains, lambda part: part)
    history: list[list[tuple[int, torch.Tensor]]] = [[] for _ in schedule]
    x, off = exact.states[0].double(), torch.zeros_like(exact.states[0], dtype=torch.float64)
    for index in range(NUM_STEPS):
        halves = []
        for half, steps in enumerate(schedule):
            if index in steps:
                history[half] = [(index, exact.halves[index][half]), *history[half]][: order + 1]
            halves.append(lagrange(history[half], index))
        out = fitted(halves, x.float(), StepContext(index, NUM_STEPS, 0.0))
        of_state, of_output = engine.sampler.gains(index, NUM_STEPS)
        off = of_state * off + of_output * (out.double() - exact.outputs[index])
        following = exact.states[index + 1] if index + 1 < NUM_STEPS else torch.zeros_like(off)
        x = following + off
    return psnr_db((off / 2).square().flatten(1).mean(1))


@pytest.mark.parametrize("name", ["dsmoe_e8", "dit_moe_qkv"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_proxy_is_the_open_loop_run(models, name: str, order: int) -> None:
    engine = make_engine(models[name])
    profile = make_profile(record(engine, requests(4), keep_halves=True), engine.mesh)
    found = Proxy(profile, engine.sampler.gains, order).psnr_db(SCHEDULES)
    expected = torch.stack([open_loop_db(engine, schedule, order) for schedule in SCHEDULES])
    # The reference fits in double but keeps float32 outputs, as a real run does.
    assert (found - expected).abs().max() < 0.05


def test_proxy_of_one_half(models) -> None:
    engine = make_engine(models["dsmoe_e8"], cfg_scale=1.0)
    profile = make_profile(record(engine, requests(3), keep_halves=True), engine.mesh)
    found = Proxy(profile, engine.sampler.gains).psnr_db([((0, 2, 5),)])
    assert found.shape == (1, 3) and (found > 0).all()


def test_proxy_and_real_run_agree_where_everything_is_computed(models) -> None:
    engine = make_engine(models["dsmoe_e8"])
    trials = Trials.open(engine, requests(4), 7, None)
    everything = even(2 * NUM_STEPS, NUM_STEPS, 2)
    trial = trials.trial(Candidate("network_forecast", 1, everything))
    assert trial.speedup == 1.0
    assert min(trial.db) > 120 and trials.proxy.psnr_db([everything]).min() > 120


def test_proxy_does_not_depend_on_what_else_is_scored(models, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(models["dsmoe_e8"])
    proxy = Proxy(make_profile(record(engine, requests(4), keep_halves=True), engine.mesh), engine.sampler.gains)
    together = proxy.psnr_db(SCHEDULES)
    monkeypatch.setattr("moeca_dist.tuning.proxy.CHUNK", 1)
    assert torch.allclose(proxy.psnr_db(SCHEDULES), together, atol=1e-6)


# ---- schedules and the search ----------------------------------------------------------------------------------------


def test_neighbours_keep_the_number_of_full_steps_and_step_zero() -> None:
    import random

    draw, schedule, counts = random.Random(0), even(7, NUM_STEPS, 2), set()
    for _ in range(300):
        schedule = neighbour(schedule, NUM_STEPS, draw)
        assert num_full(schedule) == 7 and all(steps[0] == 0 and steps[-1] < NUM_STEPS for steps in schedule)
        assert all(list(steps) == sorted(set(steps)) for steps in schedule)
        counts.add(len(schedule[0]))
    assert len(counts) > 2  # steps went from half to half


def test_even_schedules() -> None:
    assert even(5, 10, 2) == ((0, 3, 6), (0, 5))
    assert even(20, 10, 2) == (tuple(range(10)),) * 2


def test_search_finds_a_known_optimum_and_repeats_itself() -> None:
    best = ((0, 3, 5), (0, 7))

    def run(seed: int) -> Search:
        search = Search(lambda many: [-float(distance(best, each)) for each in many], 5, 10, 2, seed)
        for _ in range(20):
            search.advance()
        return search

    assert run(1).best(1) == [best]
    assert run(1).found == run(1).found != run(2).found
    apart = run(1).best(4, apart=2)
    assert all(distance(a, b) >= 2 for a, b in itertools.permutations(apart, 2))


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["network_forecast", "taylorseer", "moeca_forecast"])
@pytest.mark.parametrize("name", ["dsmoe_e8", "dit_moe_qkv"])
def test_predicted_flops_are_those_of_a_run(models, name: str, policy: Any) -> None:
    engine = make_engine(models[name])
    candidate = Candidate(policy, 1, SCHEDULES[0])
    predicted = candidate.predicted_speedup(engine.model.spec, NUM_STEPS)
    _, flops = engine.with_cache(candidate.cache()).denoise_counting(requests(3))
    if policy == "moeca_forecast":  # unmatched branches come on top
        assert predicted >= flops.speedup
    else:
        assert flops.speedup == pytest.approx(predicted, rel=1e-6)


def test_tolerance_bound() -> None:
    # Published table of one-sided factors for a normal sample: n = 10, 95% covered with 90% confidence: k = 2.568.
    values = tuple(float(value) for value in range(10))
    spread = torch.tensor(values).std().item()
    assert tolerance_bound(values) == pytest.approx(4.5 - 2.568 * spread, abs=2e-3)
    assert tolerance_bound((3.0,)) == float("-inf")


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer questions of each kind."""
    monkeypatch.setattr("moeca_dist.tuning.trials.GENERATIONS", 2)
    monkeypatch.setattr("moeca_dist.tuning.choose.LADDER", (0.2, 0.5))


@pytest.fixture
def one_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeca_dist.tuning.choose.ORDERS", (("network_forecast", (0, 1)),))


def settings(value: float = 2.0, kind: Any = "speedup", refinements: int = 2) -> Settings:
    return Settings(Target(kind, value), num_images=3, seed=7, refinements=refinements)


def test_tuning_meets_the_speedup_and_repeats_itself(models, quick) -> None:
    engine = make_engine(models["dsmoe_e8"])
    first, second = tune(engine, settings()), tune(engine, settings())
    assert first.chosen == second.chosen and first.held_out == second.held_out
    assert first.calibration == second.calibration
    assert first.held_out.speedup >= 2.0
    allowed = [trial for trial in first.trials if trial.speedup >= 2.0]
    assert first.chosen.mean_db == max(trial.mean_db for trial in allowed)
    assert {trial.candidate.policy for trial in first.trials} == {"network_forecast", "taylorseer", "moeca_forecast"}
    names = [comparison.name for comparison in first.comparisons]
    assert names == ["tuned", "uniform"]


def test_tuning_under_two_ranks_is_that_of_one(models, two_ranks, quick) -> None:
    alone = tune(make_engine(models["dsmoe_e8"]), settings())
    both = two_ranks.run(tune_on_rank, models["dsmoe_e8"])
    assert both[0] == both[1]  # every decision, and the last bit of every weight
    schedule, held_out_db = both[0][0].chosen.candidate.schedule, both[0][0].held_out.db
    assert schedule == alone.chosen.candidate.schedule
    assert held_out_db == pytest.approx(alone.held_out.db, abs=0.1)


def tune_on_rank(model: dict[str, Any]) -> Any:
    import moeca_dist.tuning.choose as choose
    from moeca_dist.tuning import trials

    # This process is a rank of the pool: nothing else tunes in it.
    trials.GENERATIONS, choose.LADDER = 2, (0.2, 0.5)
    tuned = tune(make_engine(model), settings())
    return tuned, tuned.calibration.to_json()


@pytest.mark.parametrize("runs_before", [3, 10])
def test_an_interrupted_run_goes_on_where_it_was(models, quick, one_policy, tmp_path: Path, runs_before: int) -> None:
    engine, path = make_engine(models["dsmoe_e8"]), tmp_path / "tuned.state"
    whole = tune(engine, settings(refinements=6))
    state = Interrupting(path, run_identity(engine, settings()), runs_before)
    with pytest.raises(KeyboardInterrupt):
        tune(engine, settings(refinements=6), state)
    state.close()
    with path.open("a") as file:
        file.write('{"trial": {"candid')  # killed while writing
    resumed = StateFile(path, run_identity(engine, settings()))
    found = len(resumed.records)
    assert found >= runs_before
    assert tune(engine, settings(refinements=6), resumed) == whole
    lines = path.read_text().splitlines()[1:]
    assert len(lines) == len(set(lines)) > found  # nothing is asked twice
    resumed.remove()
    assert not path.exists()


class Interrupting(StateFile):
    """Ctrl-C after some records."""

    def __init__(self, path: Path, run: dict[str, Any], records: int) -> None:
        self.left = records
        super().__init__(path, run)

    def add(self, record: dict[str, Any]) -> None:
        super().add(record)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_another_target_goes_on_with_what_is_known(models, quick, one_policy, tmp_path: Path) -> None:
    engine, path = make_engine(models["dsmoe_e8"]), tmp_path / "tuned.state"
    state = StateFile(path, run_identity(engine, settings()))
    tune(engine, settings(2.0), state)
    assert tune(engine, settings(1.5), state) == tune(engine, settings(1.5))
    state.remove()


def test_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.state"
    StateFile(path, {"seed": 1}).close()
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        StateFile(path, {"seed": 2})
    path.write_text(json.dumps({"run": {"seed": 2}}) + "\nnonsense\n")
    with pytest.raises(UserError, match="is damaged"):
        StateFile(path, {"seed": 2})


def test_unreachable_targets_name_the_best_reached(models, quick, one_policy) -> None:
    engine = make_engine(models["dsmoe_e8"])
    with pytest.raises(
        UserError, match=r"no cache reaches 1000x fewer FLOPs: the best found has .* dB .* at .*x fewer"
    ):
        tune(engine, settings(1000.0))
    with pytest.raises(UserError, match=r"this model generates latents: give --target-speedup"):
        tune(engine, settings(40.0, "psnr"))


def test_a_config_without_halves(models, quick, one_policy) -> None:
    tuned = tune(make_engine(models["dsmoe_e8"], cfg_scale=1.0), settings(refinements=1))
    assert isinstance(tuned.chosen.candidate.cache().full_steps, list)
    assert len(tuned.chosen.candidate.schedule) == 1


def test_its_own_cache_is_compared(models, quick, one_policy) -> None:
    engine = make_engine(models["dsmoe_e8"])
    halves = HalvesConfig(conditional=[0, 4], unconditional=[0, 5])
    own = engine.with_cache(CacheConfig(policy="taylorseer", full_steps=halves))
    names = [comparison.name for comparison in tune(own, settings(refinements=0)).comparisons]
    assert names == ["tuned", "uniform", "as configured (taylorseer)"]
