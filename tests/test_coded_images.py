"""Coded rows in whole networks: every policy and placement; samples are float latents, relative L2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor, nn

from moeca_dist import Engine, Report, Request
from moeca_dist.config import Config, load_config
from moeca_dist.errors import UserError
from moeca_dist.kernels.row_codes import FORMATS, SCALE_BYTES
from moeca_dist.memory import cache_size
from moeca_dist.parallel.all_to_all import SUM_HEADER_BYTES
from moeca_dist.parallel.coded_wire import KEY_BYTES
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.references import References, RowCoding
from moeca_dist.record import record_routing
from moeca_dist.report_view import render
from tests.golden_files import load_golden
from tests.test_coded_exchange import LEGS, check_lockstep, kept
from tests.test_placement_images import difference, make_config, ranks  # noqa: F401

FULL_STEPS = [0, 1, 4]
APART = {"conditional": [0, 1, 3, 5, 7], "unconditional": [0, 4]}
OWNER = {"placement": "owner"}
# The cache, and the legs that have references: single branches return without.
CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {*LEGS}),
    ({"policy": "network_forecast", "full_steps": APART}, {*LEGS}),
    ({"policy": "teacache", "delta": 0.008}, {*LEGS}),
    ({"policy": "fora", "full_steps": APART}, {*LEGS}),
    ({"policy": "taylorseer", "full_steps": FULL_STEPS}, {*LEGS}),
    ({"policy": "toca", "full_steps": APART}, {*LEGS}),
    ({"policy": "moeca_forecast", "full_steps": APART}, {"hidden"}),
    ({"policy": "moeca", "full_steps": FULL_STEPS}, {"hidden"}),
    ({"policy": "random", "full_steps": FULL_STEPS, "ratio": 0.5}, {"hidden"}),
    ({"policy": "dice_skip", "full_steps": FULL_STEPS}, {"hidden"}),
    ({"policy": "moeca_forecast", "full_steps": FULL_STEPS, **OWNER}, {*LEGS}),
    ({"policy": "random", "full_steps": APART, **OWNER}, {*LEGS}),
]
# Relative L2 to the samples of exact rows; measured: 2e-5 to 2e-4 and 1e-4 to 5e-4.
LARGEST = {"int8": 5e-4, "fp8": 2e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def coded(config: Config, rows: str) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"rows": rows})})


def five() -> list[Request]:
    return [Request(index, index % 10, seed=7) for index in range(5)]


class Watched:
    """The codings that a network was evaluated with, one for each round."""

    def __init__(self, model: nn.Module) -> None:
        self.codings: list[RowCoding] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        coding = kwargs["coding"]
        if coding is not None and not any(coding is known for known in self.codings):
            self.codings.append(coding)

    def legs(self, engine: Engine) -> set[str]:
        """Checks every round on all ranks of the group; which legs have references."""
        group, found = engine.mesh.expert_group, set()
        assert group is not None and self.codings
        for coding in self.codings:
            mine = {block: kept(coding.blocks[block]) for block in engine.model.spec.moe_blocks}
            everywhere = group.gather_objects(mine)
            for block in mine:
                found |= check_lockstep(coding.places.tokens, [theirs[block] for theirs in everywhere])
        return found


def generate(config: Config, times: int = 1) -> tuple[NDArray[np.generic], Report, set[str]]:
    """Runs on every rank of a pool: five images, after ``times - 1`` runs of others; and which legs have references."""
    mesh = Mesh.create(LauncherEnv.read(), ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    watched = Watched(engine.model)
    for _ in range(times - 1):
        engine.generate([Request(30 + index, index, seed=2) for index in range(7)])
    images, report = engine.generate(five())
    legs = watched.legs(engine) if config.parallel.rows != "exact" and mesh.ep_size > 1 else set()
    return images, report, legs


def both(config: Config, rows: str) -> tuple[Any, Any]:
    """As ``generate``, with rows as computed and coded."""
    return generate(coded(config, "exact")), generate(coded(config, rows))


@pytest.mark.parametrize(("cache", "legs"), CASES)
@pytest.mark.parametrize("rows", FORMATS)
def test_every_policy(two_ranks: Any, model: dict[str, Any], rows: str, cache: dict[str, Any], legs: set[str]) -> None:
    (exact, plain, _), (images, report, found) = two_ranks.run(both, make_config(model, cache), rows)[0]
    assert found == legs
    distance = difference(images, exact)
    assert 0 < distance < LARGEST[rows]
    assert report.exchange.rows == rows and plain.exchange.rows == "exact"
    assert report.exchange.collectives == plain.exchange.collectives
    assert report.exchange.bytes_sent < plain.exchange.bytes_sent


@pytest.mark.parametrize("world", [(4, 4), (4, 2)], ids=["EP4", "DP2xEP2"])
@pytest.mark.parametrize(("cache", "legs"), [CASES[index] for index in (0, 1, 8, 10)])
def test_more_ranks(
    ranks: Any,  # noqa: F811
    model: dict[str, Any],
    cache: dict[str, Any],
    legs: set[str],
    world: tuple[int, int],
) -> None:
    """Five images: some ranks have two, some one, some none."""
    (exact, _, _), (images, _, found) = ranks(world[0]).run(both, make_config(model, cache, world[1]), "int8")[0]
    assert found == legs and 0 < difference(images, exact) < LARGEST["int8"]


# ---- one batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"policy": "network_forecast", "full_steps": APART}], ids=str)
def test_a_batch_never_sees_references_of_another(two_ranks: Any, model: dict[str, Any], cache: dict[str, Any]) -> None:
    """The same samples bit for bit, whatever the engine made before; and a round has references of its own."""
    config = coded(make_config(model, cache), "int8")
    fresh, after = (two_ranks.run(generate, config, times)[0] for times in (1, 3))
    assert np.array_equal(fresh[0], after[0]) and fresh[1].exchange.bytes_sent == after[1].exchange.bytes_sent


def without_others(config: Config) -> tuple[Any, Any]:
    """Samples with and without a second image on this rank."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    return engine.generate(five()[:4])[0], engine.generate(five()[:2])[0]


def test_an_image_stays_what_it_is_beside_others(two_ranks: Any, model: dict[str, Any]) -> None:
    """To rounding, which codes may magnify: a row between two codes."""
    cache = {"policy": "network_forecast", "full_steps": APART}
    beside, alone = two_ranks.run(without_others, coded(make_config(model, cache), "int8"))[0]
    assert difference(beside[:1], alone[:1]) < 1e-5


# ---- the report ------------------------------------------------------------------------------------------------------


def counted(config: Config) -> tuple[Report, Report, int, int, int]:
    """On every rank, without a cache: both reports; this rank's branches and pairs with other owners; hidden size."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    away = [0, 0]

    def count(_: nn.Module, __: Any, routing: Any) -> None:
        owner_TK = routing.expert_ids_TK // (engine.model.spec.num_experts // 2)
        others_TK: Tensor = owner_TK != mesh.ep_rank
        away[0] += int(others_TK.sum())
        away[1] += int(others_TK.any(1).sum())

    hooks = [layer.gate.register_forward_hook(count) for _, layer in engine.model.moe_layers()]
    _, report = engine.generate(five())
    for hook in hooks:
        hook.remove()
    _, exact = engine.without_cache().generate(five())
    return report, exact, away[0], away[1], engine.model.spec.hidden_size


def test_bytes_are_what_travels(two_ranks: Any, model: dict[str, Any]) -> None:
    outcomes = two_ranks.run(counted, coded(make_config(model, {}), "fp8"))
    report, exact, _, _, width = outcomes[0]
    branches, pairs = (sum(outcome[index] for outcome in outcomes) for index in (2, 3))
    coded_bytes = branches * SUM_HEADER_BYTES + pairs * (KEY_BYTES + 2 * (SCALE_BYTES + width))
    assert report.exchange.bytes_sent == coded_bytes
    # The figure without codes; and the engine's own reference has none.
    assert report.exchange.bytes_full == branches * SUM_HEADER_BYTES + pairs * 2 * 4 * width
    assert exact.exchange.bytes_full == exact.exchange.bytes_sent > 3 * coded_bytes
    assert exact.exchange.rows == "exact" and exact.exchange.reference_bytes == 0
    assert sum(report.exchange.bytes_per_step) == report.exchange.bytes_sent
    text = render(json.loads(report.to_json()))
    assert (
        "rows travel as" in text and "fp8 codes" in text and "rows travel as" not in render(json.loads(exact.to_json()))
    )


def sizes(config: Config, count: int) -> tuple[Report, list[int]]:
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    _, report = engine.generate(five()[:count])
    size = cache_size(config, engine.model.spec, engine.num_steps, mesh.ep_size)
    return report, [0 if size is None else size.of(images) for images in range(4)]


@pytest.mark.parametrize(
    "cache",
    [
        {"policy": "network_forecast", "full_steps": APART},
        {"policy": "moeca_forecast", "full_steps": FULL_STEPS},
        {"policy": "fora", "full_steps": FULL_STEPS},
    ],
    ids=lambda cache: cache["policy"],
)
def test_references_are_in_the_memory_that_is_predicted(two_ranks: Any, model: dict[str, Any], cache: Any) -> None:
    plain = make_config(model, cache)
    report, predicted = two_ranks.run(sizes, coded(plain, "int8"), 3)[0]
    before, without = two_ranks.run(sizes, plain, 3)[0]
    assert report.cache.bytes_peak == predicted[1] + predicted[2]
    assert report.exchange.reference_bytes == report.cache.bytes_peak - before.cache.bytes_peak > 0
    assert predicted[2] > without[2] and before.exchange.reference_bytes == 0
    uncached, _ = two_ranks.run(sizes, coded(make_config(model, {}), "int8"), 3)[0]
    assert uncached.cache.bytes_peak == 0
    legs = 1 if cache["policy"] == "moeca_forecast" else 2
    assert uncached.exchange.reference_bytes == report.exchange.reference_bytes * 2 // legs


def test_owners_keep_references_too(two_ranks: Any, model: dict[str, Any]) -> None:
    cache = {"policy": "moeca_forecast", "full_steps": FULL_STEPS, **OWNER}
    report, predicted = two_ranks.run(sizes, coded(make_config(model, cache), "int8"), 4)[0]
    before, without = two_ranks.run(sizes, make_config(model, cache), 4)[0]
    references = report.exchange.reference_bytes
    assert report.cache.bytes_peak - before.cache.bytes_peak == references == 2 * (predicted[2] - without[2]) > 0


def test_on_one_rank_nothing_travels(model: dict[str, Any]) -> None:
    """A job may run on any number of ranks: the same images, and the report says that rows are as computed."""
    config = make_config(model, {"policy": "network_forecast", "full_steps": APART})
    plain, of_plain = Engine.from_config(config, mesh=Mesh.single()).generate(five())
    images, report = Engine.from_config(coded(config, "int8"), mesh=Mesh.single()).generate(five())
    assert np.array_equal(images, plain)
    assert report.exchange == of_plain.exchange and report.exchange.rows == "exact"
    assert report.cache.bytes_peak == of_plain.cache.bytes_peak


def traced(config: Config) -> Any:
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    watched = Watched(engine.model)
    trace = record_routing(engine, five())
    return (None if trace is None else trace.refreshed_SLHBTK.sum()), watched.legs(engine)


def test_a_recorded_run_is_coded_too(two_ranks: Any, model: dict[str, Any]) -> None:
    computed, legs = two_ranks.run(traced, coded(make_config(model, {}), "int8"))[0]
    assert computed > 0 and legs == {*LEGS}


def test_without_references_more_is_lost(two_ranks: Any, model: dict[str, Any]) -> None:
    """What the change is worth: the same codes of whole rows."""
    config = make_config(model, {})
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"num_steps": 32})})
    exact, coded_samples, by_themselves = two_ranks.run(with_and_without_references, config)[0]
    assert 2 * difference(coded_samples, exact) < difference(by_themselves, exact)


def with_and_without_references(config: Config) -> tuple[Any, Any, Any]:
    exact, changes = both(config, "fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(References, "_held", lambda *args: None)
        return exact[0], changes[0], generate(coded(config, "fp8"))[0]


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("parallel: {rows: fp4}\n")
    with pytest.raises(UserError, match=r"parallel\.rows must be 'exact', 'fp8' or 'int8'"):
        load_config(tmp_path / "run.yaml")
