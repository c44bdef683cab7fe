"""CUDA graphs without a device: which evaluations are captured, what their replays compute, what is refused.

A tape stands in for a graph: it lists the operators of an evaluation with their tensors and repeats them on the same
memory, without the host's code. What it cannot show is what a device does with them: ``tests/kernels/test_gpu.py``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeca_dist import Engine, Request, UserError
from moeca_dist.config import CacheConfig, Config
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.cuda_graphs import GraphedModel, Recording, check_graphs
from moeca_dist.tuning.experts.record import record_routing
from tests.helpers.golden_files import load_golden
from tests.helpers.host_waits import READS, WAITING
from tests.whole_runs.test_locations import make_config


class Tape(TorchDispatchMode):
    """Records operators. Memory that they write to is as it was before when the recording ends, as in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

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

    def restore(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

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
    """What ``record_on_cuda`` is on a device; counts what was recorded."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a tensor is read by the host")

        with pytest.MonkeyPatch.context() as patch, Tape() as tape:
            for name in READS:
                patch.setattr(Tensor, name, refuse)
            output = work()
        tape.restore()
        self.num_recorded += 1
        return Recording(tape.replay, output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


@pytest.mark.parametrize("cfg_scale", [1.5, 1.0])
def test_replays_are_the_eager_run(model: dict[str, Any], cfg_scale: float) -> None:
    """Seven images in rounds of two and one of one, twice with other seeds: the same bits, and the same report."""
    config = make_config(model, {})
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"cfg_scale": cfg_scale})})
    engine = Engine.from_config(config, mesh=Mesh.single())
    eager = Engine(engine.config, engine.mesh, engine.model)
    recorder = TapeRecorder()
    engine.graphed_model = GraphedModel(engine.model, recorder)
    for seed in (5, 6):
        wanted = [Request(index, index, seed=seed) for index in range(7)]
        images, report = engine.generate(wanted)
        expected, alone = eager.generate(wanted)
        assert np.array_equal(images, expected)
        assert (report.branches, report.flops, report.cache) == (alone.branches, alone.flops, alone.cache)
        # One graph for each number of images, for all steps and runs.
        assert recorder.num_recorded == 2
        assert ("graph" in report.seconds.slowest) and ("graph" not in alone.seconds.slowest)


def test_outputs_are_not_overwritten(model: dict[str, Any]) -> None:
    """Solvers remember earlier outputs, and the next replay writes to the same memory."""
    engine = Engine.from_config(make_config(model, {}), mesh=Mesh.single())
    graphed, spec = GraphedModel(engine.model, TapeRecorder()), engine.model.spec
    x_NCHW = torch.randn(3, 2, spec.in_channels, spec.input_size, spec.input_size)
    t_N, y_N = torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [4, spec.null_label]])
    with torch.no_grad():
        outputs = [graphed(*inputs) for inputs in zip(x_NCHW, t_N, y_N, strict=True)]
        for output, inputs in zip(outputs, zip(x_NCHW, t_N, y_N, strict=True), strict=True):
            assert torch.equal(output, engine.model(*inputs))


def test_ranks_without_images_and_caches_run_eagerly(model: dict[str, Any]) -> None:
    engine = Engine.from_config(make_config(model, {}), mesh=Mesh.single())
    recorder = TapeRecorder()
    engine.graphed_model = GraphedModel(engine.model, recorder)
    assert engine.denoise([]).shape[0] == 0 and recorder.num_recorded == 0
    engine.plan = replace(engine.plan, config=graphed(model, {}))
    assert engine.with_cache(CacheConfig(policy="fora")).graphed_model is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def graphed(model: dict[str, Any], cache: dict[str, Any], **options: Any) -> Config:
    stated = {"model": model | {"device": "auto", "cuda_graphs": True, "dtype": "bfloat16"} | options}
    return Config.model_validate(make_config(model, cache).model_dump() | stated)


@pytest.mark.parametrize(
    ("cache", "options", "message"),
    [
        ({"policy": "network_forecast"}, {}, "network_forecast computes other parts in other steps"),
        ({"policy": "teacache"}, {}, "set cache.policy=none"),
        ({"policy": "random"}, {}, "set cache.policy=none"),
        ({}, {"dtype": "float32"}, "set model.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_steps_that_follow_the_data_are_refused(
    model: dict[str, Any], cache: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = graphed(model, cache, **options)
    spec = Engine.from_config(make_config(model, {}), mesh=Mesh.single()).model.spec
    with pytest.raises(UserError, match=message) as refused:
        check_graphs(config, spec)
    assert "\n" not in str(refused.value) and "remove model.cuda_graphs" in str(refused.value)


def test_devices_and_groups_that_cannot_are_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model.cuda_graphs needs a CUDA device, not model.device cpu"):
        graphed(model, {}, device="cpu")
    config = graphed(model, {})
    loaded = Engine.from_config(make_config(model, {}), mesh=Mesh.single())
    with pytest.raises(UserError, match=r"needs a CUDA device, and the model runs on the CPU here"):
        Engine(config, loaded.mesh, loaded.model)
    group = Mesh(0, 2, 2, torch.device("cuda"), "nccl", None, None)
    with pytest.raises(UserError, match=r"the 2 ranks of an expert-parallel group .* set parallel.ep_size=1"):
        Engine(config, group, loaded.model)
    assert Engine(make_config(model, {}), loaded.mesh, loaded.model).graphed_model is None


def test_a_routing_trace_is_refused(model: dict[str, Any]) -> None:
    engine = Engine.from_config(make_config(model, {}), mesh=Mesh.single())
    engine.graphed_model = GraphedModel(engine.model, TapeRecorder())
    with pytest.raises(UserError, match=r"copied to the host in every step: remove model.cuda_graphs"):
        record_routing(engine, [Request(0, 0)])
