"""CUDA graphs without a device: which evaluations are captured, what a chain of them computes, what is refused.

A tape stands in for a graph: it lists the operators of an evaluation with their tensors and repeats them on the same
memory, without the host's code. What it cannot show is what a device does with them: ``tests/kernels/test_gpu.py``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeca_dist import Engine, Request, UserError
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.cuda_graphs import GraphCounts, StepGraphs, check_graphs
from tests.helpers.golden_files import load_golden
from tests.test_budget_exchange import READS, WAITING
from tests.whole_runs.test_locations import make_config

FULL_STEPS = [0, 1, 4]
BUDGET = {"exchange": "budget", "budget": 3}
NUM_STEPS = 8


class Tape(TorchDispatchMode):
    """Records operators. Memory that they write to is as it was before when the recording ends, as in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.output = torch.empty(0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function).removeprefix("aten.")
        assert not name.startswith(WAITING), f"{name} makes the host wait for the device"
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(given)
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._save(kwargs[argument.name])
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    def _save(self, written: Tensor) -> None:
        storage = written.untyped_storage()
        self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def end(self, output: Tensor) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()
        self.output = output

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            returns = function._schema.returns
            if returns and all(each.alias_info is not None and not each.alias_info.is_write for each in returns):
                continue  # a view shows what lies there by now
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    def record(self, work: Callable[[], Tensor]) -> Tape:
        def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a tensor is read by the host")

        with pytest.MonkeyPatch.context() as patch, Tape() as tape:
            for name in READS:
                patch.setattr(Tensor, name, refuse)
            output = work()
        tape.end(output)
        return tape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def config_of(model: dict[str, Any], cache: dict[str, Any], parallel: dict[str, Any]) -> Config:
    config = make_config(model, cache)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


CASES = [
    ({}, {}),
    ({"policy": "fora", "interval": 3}, {}),
    ({"policy": "taylorseer", "full_steps": {"conditional": [0, 1, 4], "unconditional": [0, 3]}, "order": 2}, {}),
    ({"policy": "network_forecast", "full_steps": {"conditional": [0, 2, 4], "unconditional": [0, 3]}}, {}),
    ({"policy": "moeca_forecast", "full_steps": FULL_STEPS}, BUDGET),
    ({"policy": "moeca_forecast", "full_steps": FULL_STEPS, "dtype": "bfloat16"}, BUDGET | {"budget_fill": True}),
    ({"policy": "random", "full_steps": FULL_STEPS, "order": 1, "extra_entries": 1}, BUDGET),
    ({"policy": "moeca", "full_steps": FULL_STEPS, "attention_sync": False}, BUDGET),
    ({"policy": "dice_skip", "full_steps": FULL_STEPS}, BUDGET),
]


@pytest.mark.parametrize(("cache", "parallel"), CASES)
def test_replays_are_the_eager_run(model, cache: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Seven images in rounds of two and one of one, twice with other seeds: the same bits, and the same report."""
    engine = Engine.from_config(config_of(model, cache, parallel), mesh=Mesh.single())
    eager = Engine(engine.config, engine.mesh, engine.model)
    engine.graphs = StepGraphs(TapeRecorder, NUM_STEPS)
    for seed in (5, 6):
        wanted = [Request(index, index, seed=seed) for index in range(7)]
        images, report = engine.generate(wanted)
        expected, alone = eager.generate(wanted)
        assert np.array_equal(images, expected)
        assert (report.branches, report.flops, report.cache) == (alone.branches, alone.flops, alone.cache)
        assert report.exchange.budget == alone.exchange.budget and alone.graphs is None
        assert report.graphs is not None and sum(report.graphs.values()) - report.graphs["captured"] == 4 * NUM_STEPS
        # Of four rounds in the first run one of each size is eager; in the second run the single image is captured.
        first, one = seed == 5, 0 if cache else 1
        steps = {True: (2 * NUM_STEPS, NUM_STEPS), False: (0, NUM_STEPS)}[first] if cache else (2 * first, 2 * first)
        assert (report.graphs["eager"], report.graphs["captured"]) == steps
        assert ("graph" in report.seconds.slowest) and (one or "graph" not in alone.seconds.slowest)
        assert "evaluations eager" in report.summary()


def test_a_round_that_failed_is_captured_anew(model) -> None:
    """Its chain ends in the middle; the next round does not continue it."""
    engine = Engine.from_config(config_of(model, *CASES[4]), mesh=Mesh.single())
    expected, _ = engine.generate([Request(3, 3)])
    engine.graphs = StepGraphs(TapeRecorder, NUM_STEPS)
    engine.generate([Request(0, 0)])

    def fail(step: Any) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_into(lambda *_: None, [Request(1, 1)], watcher=fail)
    for captured in (NUM_STEPS, 0):
        images, report = engine.generate([Request(3, 3)])
        assert np.array_equal(images, expected)
        assert report.graphs == {"eager": 0, "captured": captured, "replayed": NUM_STEPS}


def test_ranks_without_images_and_other_caches_run_eagerly(model) -> None:
    engine = Engine.from_config(config_of(model, *CASES[4]), mesh=Mesh.single())
    engine.graphs = StepGraphs(TapeRecorder, NUM_STEPS)
    assert engine.denoise([]).shape[0] == 0
    counts = GraphCounts(1, 2, 3)
    counts.add(GraphCounts(4, 5, 6))
    assert counts == GraphCounts(5, 7, 9)


# ---- what is refused -------------------------------------------------------------------------------------------------


def graphed(model: dict[str, Any], cache: dict[str, Any], parallel: dict[str, Any], **options: Any) -> Config:
    stated = {"model": model | {"device": "auto", "cuda_graphs": True, "dtype": "bfloat16"} | options}
    return Config.model_validate(config_of(model, cache, parallel).model_dump() | stated)


@pytest.mark.parametrize(
    ("cache", "parallel", "options", "message"),
    [
        ({"policy": "teacache"}, {}, {}, "teacache decides in every step, from the data"),
        ({"policy": "toca"}, {}, {}, "as many rows as the data asks for"),
        ({"policy": "moeca"}, BUDGET, {}, "without attention_sync"),
        ({"policy": "random"}, {}, {}, "set parallel.exchange=budget"),
        ({"policy": "random", "full_steps": {"conditional": [0, 2], "unconditional": [0]}}, BUDGET, {}, "step 2, "),
        ({}, {}, {"dtype": "float32"}, "set model.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_steps_that_follow_the_data_are_refused(
    model, cache: dict[str, Any], parallel: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = graphed(model, cache, parallel, **options)
    spec = Engine.from_config(config_of(model, {}, {}), mesh=Mesh.single()).model.spec
    policy = build_policy(config.cache, NUM_STEPS, guided=True)
    with pytest.raises(UserError, match=message) as refused:
        check_graphs(config, policy, spec, NUM_STEPS)
    assert "\n" not in str(refused.value) and "remove model.cuda_graphs" in str(refused.value)


def test_devices_and_groups_that_cannot_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"model.cuda_graphs needs a CUDA device, not model.device cpu"):
        graphed(model, {}, {}, device="cpu")
    config = graphed(model, {}, {})
    loaded = Engine.from_config(config_of(model, {}, {}), mesh=Mesh.single())
    with pytest.raises(UserError, match=r"needs a CUDA device, and the model runs on the CPU here"):
        Engine(config, loaded.mesh, loaded.model)
    group = Mesh(0, 2, 2, torch.device("cuda"), "nccl", None, None)
    with pytest.raises(UserError, match=r"the 2 ranks of an expert-parallel group .* set parallel.ep_size=1"):
        Engine(config, group, loaded.model)
    assert Engine(config_of(model, {}, {}), loaded.mesh, loaded.model).graphs is None
