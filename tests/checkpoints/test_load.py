"""Loading: every published wrapping, only what a rank needs, and one clear line for everything that is wrong."""

import argparse
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moeca_dist
from moeca_dist.checkpoints import tensor_source
from moeca_dist.checkpoints.convert import convert
from moeca_dist.checkpoints.load import load_model
from moeca_dist.errors import UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.registry import FAMILIES
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import Mesh
from tests.helpers.golden_files import GoldenFile, load_golden

UNEVEN = ExpertPlacement((0, 0, 0, 1, 0, 1, 1, 0), 2)
BIG = 8 * 2**20  # elements of an optimiser state that dwarfs the weights


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device "auto" means the CPU here, where all values are compared, also on a machine that has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def golden() -> GoldenFile:
    return load_golden("dsmoe_e8")


@pytest.fixture
def saved(golden: GoldenFile, tmp_path: Path) -> Path:
    return golden.write_checkpoint(tmp_path / "model.pt")


def rank_of(size: int, rank: int) -> Mesh:
    """A rank of an expert-parallel group that never communicates."""
    return Mesh(rank, size, size, torch.device("cpu"), None, None, None)


def original_layout(model: DiffusionTransformer) -> dict[str, Tensor]:
    """The weights a model holds, under the published keys."""
    family = FAMILIES[model.spec.family]
    state = dict(model.state_dict())
    for block, layer in model.moe_layers():
        for weight, projection in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            stacked = state.pop(f"{family.experts_prefix(block)}.{weight}")
            assert len(stacked) == len(layer.local_expert_ids)
            for expert, matrix in zip(layer.local_expert_ids, stacked, strict=True):
                state[family.expert_key(block, expert, projection)] = matrix
    return state


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def forward(model: DiffusionTransformer, golden: GoldenFile) -> Tensor:
    with torch.no_grad():
        return model(golden["x"], golden["t"], golden["y"])


def refused(match: str, path: Path, **options: Any) -> None:
    """Loading fails with one line that names the file (unless an option is at fault) and matches ``match``."""
    with pytest.raises(UserError, match=match) as caught:
        load_model(path, **options)
    assert "\n" not in str(caught.value)


# ---- wrappings -------------------------------------------------------------------------------------------------------

State = dict[str, Tensor]


def trainer_state(state: State) -> dict[str, Any]:
    """What a DSMoE training run saves: raw weights, averaged weights, optimiser, command line."""
    raw = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    opt = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-4}]}
    return {"model": raw, "ema": state, "opt": opt, "args": argparse.Namespace(model="S", lr=1e-4, betas=(0.9, 0.95))}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "ema": lambda state: {"ema": state},
    "model": lambda state: {"model": state},
    "model without averages": lambda state: {"model": state, "ema": None, "args": argparse.Namespace()},
    "trainer": trainer_state,
    "trainer without opt": lambda state: {k: v for k, v in trainer_state(state).items() if k != "opt"},
    "module": lambda state: {"module": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}},
    "data parallel": lambda state: {"ema": {f"module.{key}": tensor for key, tensor in state.items()}},
    "nested": lambda state: {"model": {"module": {f"module.model.{k}": v for k, v in state.items()}}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_every_wrapping_gives_the_same_weights(golden: GoldenFile, tmp_path: Path, wrapping: str, suffix: str) -> None:
    path = tmp_path / f"0700000{suffix}"
    torch.save(WRAPPINGS[wrapping](dict(golden.state_dict)), path)
    model = load_model(path, **golden.options)
    assert_same(original_layout(model), golden.state_dict)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_gives_the_same_weights(golden: GoldenFile, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({prefix + key: tensor for key, tensor in golden.state_dict.items()}, path)
    assert_same(original_layout(load_model(path, **golden.options)), golden.state_dict)


def test_sharded_folder_gives_the_same_weights_and_needs_no_options(
    golden: GoldenFile, saved: Path, tmp_path: Path
) -> None:
    folder = convert(saved, tmp_path / "sharded", num_shards=3, **golden.options)
    model = load_model(folder)
    assert_same(original_layout(model), golden.state_dict)
    assert model.spec == load_model(saved, **golden.options).spec


def test_legacy_pickle_loads_with_a_warning(
    golden: GoldenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.pt"
    torch.save(trainer_state(dict(golden.state_dict)), path, _use_new_zipfile_serialization=False)
    model = load_model(path, **golden.options)
    assert_same(original_layout(model), golden.state_dict)
    assert "old format" in caplog.text


@pytest.mark.parametrize("name", ["dsmoe_e8", "dit_moe_qkv"])
def test_forward_reproduces_the_official_output(tmp_path: Path, name: str) -> None:
    golden = load_golden(name)
    model = moeca_dist.load_model(golden.write_checkpoint(tmp_path / "model.pt"), **golden.options)
    assert (forward(model, golden) - golden["output"]).abs().max() <= 1e-5


# ---- only what is needed ---------------------------------------------------------------------------------------------


def resident_bytes(path: Path) -> int:
    """Bytes of ``path`` that are mapped and resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux memory maps")
def test_optimiser_state_is_never_read(golden: GoldenFile, tmp_path: Path) -> None:
    path = tmp_path / "0700000.pt"
    torch.save(trainer_state(dict(golden.state_dict)) | {"opt": {"exp_avg": torch.ones(BIG)}}, path)
    source = tensor_source.open_source(path)
    for key in source.infos:
        source.get(key).sum()
    weights = sum(info.nbytes for info in source.infos.values())
    assert weights <= resident_bytes(path) <= weights + BIG  # of 4 * BIG bytes of optimiser state


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("format", ["pt", "sharded"])
def test_rank_holds_its_own_experts_alone(
    golden: GoldenFile, saved: Path, tmp_path: Path, rank: int, format: str
) -> None:
    path = saved if format == "pt" else convert(saved, tmp_path / "sharded", num_shards=8, **golden.options)
    model = load_model(path, mesh=rank_of(2, rank), placement=UNEVEN, **golden.options)
    mine = UNEVEN.experts_of(rank)
    assert all(layer.local_expert_ids == mine for _, layer in model.moe_layers())
    expected = {key: tensor for key, tensor in golden.state_dict.items() if _expert_of(key) in (None, *mine)}
    assert_same(original_layout(model), expected)


def _expert_of(key: str) -> int | None:
    match = re.search(r"experts\.blocks\.(\d+)\.", key)
    return None if match is None else int(match[1])


def test_rank_reads_only_its_own_experts(
    golden: GoldenFile, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(saved, tmp_path / "sharded", num_shards=8, **golden.options)
    opened: list[str] = []

    class Recorder(tensor_source.SafetensorsFile):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(tensor_source, "SafetensorsFile", Recorder)
    load_model(folder, mesh=rank_of(2, 1), placement=UNEVEN)
    experts = [f"experts-{expert:05d}-of-00008.safetensors" for expert in UNEVEN.experts_of(1)]
    assert sorted(opened) == sorted(["dense.safetensors", *experts])


def test_default_placement_is_equal_runs_also_with_more_ranks_than_experts(golden: GoldenFile, saved: Path) -> None:
    held = [load_model(saved, mesh=rank_of(10, rank), **golden.options) for rank in range(10)]
    ids = [next(model.moe_layers())[1].local_expert_ids for model in held]
    assert ids == [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (), ()]


def test_placement_must_fit_experts_and_mesh(golden: GoldenFile, saved: Path) -> None:
    refused("placement is for 8 experts on 2 ranks", saved, placement=UNEVEN, **golden.options)
    short = ExpertPlacement((0, 1), 2)
    refused("placement is for 2 experts", saved, mesh=rank_of(2, 0), placement=short, **golden.options)


# ---- dtype and device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_casts_all_but_the_fp32_router(golden: GoldenFile, saved: Path, dtype: Any) -> None:
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    model = load_model(saved, dtype=dtype, **golden.options)
    for key, tensor in original_layout(model).items():
        wanted = torch.float32 if ".mlp.gate." in key else expected
        assert tensor.dtype == wanted, key
        assert torch.equal(tensor, golden.state_dict[key].to(wanted)), key
    output = forward(model, golden).float()
    assert (output - golden["output"]).norm() <= 0.05 * golden["output"].norm()


def test_half_precision_file_loads_as_float32(golden: GoldenFile, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    half = {key: tensor.to(torch.bfloat16) for key, tensor in golden.state_dict.items()}
    torch.save(half, path)
    model = load_model(path, **golden.options)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert_same(original_layout(model), {key: tensor.float() for key, tensor in half.items()})


def test_device_is_checked(golden: GoldenFile, saved: Path) -> None:
    assert load_model(saved, device="auto", **golden.options).x_embedder.proj.weight.device.type == "cpu"
    assert load_model(saved, device=torch.device("cpu"), **golden.options).x_embedder.proj.weight.device.type == "cpu"
    refused("choose one of auto, cpu, cuda", saved, device="gpu", **golden.options)
    refused("is not the mesh's cpu", saved, mesh=rank_of(2, 0), device="cuda", **golden.options)
    refused("finds no CUDA device", saved, device="cuda", **golden.options)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_unknown_option_names_the_nearest(saved: Path) -> None:
    refused("unknown model option 'num_head': did you mean num_heads", saved, num_head=2)
    refused("unknown model option 'colour': known are family, num_heads", saved, colour="red")


@pytest.mark.parametrize(
    "option", [{"num_heads": 0}, {"num_heads": "2"}, {"topk_group": True}, {"routed_scaling_factor": -1.0}]
)
def test_option_of_wrong_kind_is_refused(saved: Path, option: dict[str, Any]) -> None:
    refused(f"model option {next(iter(option))} is", saved, **option)
    refused("dtype is 'int8': choose one of float32", saved, dtype="int8")


def test_unstated_option_is_asked_for(saved: Path) -> None:
    refused(r"model\.pt: .*num_heads.*model\.num_heads=N", saved)
    refused("num_heads", saved, num_heads=None)


def test_options_override_what_the_checkpoint_states(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    folder = convert(saved, tmp_path / "sharded", **golden.options)
    assert load_model(folder, routed_scaling_factor=3.5).spec.routed_scaling_factor == 3.5
    refused("cannot serve num_experts_per_tok", folder, topk_group=1, num_experts_per_tok=5)
    refused("is a dsmoe checkpoint, not dit_moe", folder, family="dit_moe")
    refused("is a dsmoe checkpoint, not dit_moe", saved, family="dit_moe", **golden.options)


def test_contradicting_options_are_refused(golden: GoldenFile, saved: Path) -> None:
    refused("not a multiple of num_heads", saved, **golden.options | {"num_heads": 5})


# ---- what is not a checkpoint ----------------------------------------------------------------------------------------


def test_missing_and_misnamed_files(tmp_path: Path) -> None:
    refused("does not exist", tmp_path / "none.pt")
    (tmp_path / "empty.pt").touch()
    refused("is empty", tmp_path / "empty.pt")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    refused(r"expected \.pt, \.pth, \.safetensors", tmp_path / "model.onnx")
    (tmp_path / "text.pt").write_text("hello, I am not a checkpoint")
    refused("not a PyTorch file", tmp_path / "text.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    refused("git lfs pull", tmp_path / "lfs.pt")
    (tmp_path / "text.safetensors").write_text("hello, I am not a checkpoint")
    refused("not a complete safetensors file", tmp_path / "text.safetensors")
    save_file({}, tmp_path / "nothing.safetensors")
    refused("holds no tensor", tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("format", ["pt", "legacy", "safetensors"])
def test_truncated_file_is_named(golden: GoldenFile, tmp_path: Path, format: str, kept: float) -> None:
    path = tmp_path / ("cut.safetensors" if format == "safetensors" else "cut.pt")
    if format == "safetensors":
        save_file(dict(golden.state_dict), path)
    else:
        torch.save(dict(golden.state_dict), path, _use_new_zipfile_serialization=format == "pt")
    content = path.read_bytes()
    path.write_bytes(content[: math.floor(len(content) * kept)])
    refused(r"cut\.(pt|safetensors) (is|holds).*again", path, **golden.options)


class _Payload:
    """Pickles to a call that leaves a trace if it is ever made."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_and_not_run(golden: GoldenFile, tmp_path: Path, new_format: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"ema": dict(golden.state_dict), "opt": _Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    refused(r"pickled code \((posix|nt)\.mkdir\), which is never run", path, **golden.options)
    path.write_bytes(pickle.dumps(_Payload(trace), protocol=2))
    refused("never run|damaged", path, **golden.options)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(2)], "holds a list, not a state dict"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
        ({}, "holds nothing"),
        ({"epoch": 3, "x_embedder.proj.weight": torch.zeros(2)}, "holds 'epoch'"),
        ({"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, r"no known model.*conv1\.weight, fc\.bias"),
        ({"blocks.1.mlp.gate_weight": torch.zeros(2)}, "is a DiffMoE checkpoint"),
        ({"blocks.1.mlp.capacity_predictor.0.weight": torch.zeros(2)}, "is a DiffMoE checkpoint"),
        ({"blocks.1.mlp.experts.blocks.0.up_proj.weight": torch.zeros(2, 2)}, "lacks x_embedder"),
    ],
)
def test_foreign_content_is_named(tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    refused(rf"foreign\.pt.*{match}", path)


# ---- nearly the right checkpoint -------------------------------------------------------------------------------------


def damaged(golden: GoldenFile, path: Path, change: Callable[[State], Any]) -> Path:
    state = dict(golden.state_dict)
    change(state)
    torch.save({"ema": state}, path)
    return path


FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        lambda state: state.pop("blocks.3.mlp.experts.blocks.5.up_proj.weight"),
        r"lacks blocks\.3\.mlp\.experts\.blocks\.5\.up_proj\.weight;",
    ),
    "extra": (
        lambda state: state.update({"blocks.0.attn.q_norm.weight": torch.ones(16)}),
        r"has unknown blocks\.0\.attn\.q_norm\.weight;",
    ),
    "renamed": (
        lambda state: state.update({"t_embedder.mlp.9.bias": state.pop("t_embedder.mlp.0.bias")}),
        r"lacks t_embedder\.mlp\.0\.bias and has unknown t_embedder\.mlp\.9\.bias;",
    ),
    "no block 2": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("blocks.2.")],
        r"lacks blocks\.2\.\S+, blocks\.2\.\S+, blocks\.2\.\S+, blocks\.2\.\S+ and \d+ more",
    ),
    "shape": (
        lambda state: state.update({"blocks.3.mlp.gate.weight": torch.zeros(8, 31)}),
        r"blocks\.3\.mlp\.gate\.weight has shape \[8, 31\], .*needs \[8, 32\]",
    ),
    "transposed expert": (
        lambda state: state.update({"blocks.1.mlp.experts.blocks.2.down_proj.weight": torch.zeros(64, 32)}),
        r"blocks\.2\.down_proj\.weight has shape \[64, 32\], .*needs \[32, 64\]",
    ),
    "dimensions": (
        lambda state: state.update({"x_embedder.proj.weight": torch.zeros(32, 16)}),
        "does not describe a dsmoe network",
    ),
    "quantised": (
        lambda state: state.update({"blocks.0.mlp.fc1.weight": torch.zeros(128, 32, dtype=torch.int8)}),
        r"fc1\.weight is stored as torch\.int8; quantised",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nearly_right_checkpoint_is_refused(golden: GoldenFile, tmp_path: Path, fault: str) -> None:
    change, match = FAULTS[fault]
    refused(rf"near\.pt.*{match}", damaged(golden, tmp_path / "near.pt", change), **golden.options)


def test_nothing_is_allocated_before_the_checks(
    golden: GoldenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged(golden, tmp_path / "near.pt", FAULTS["transposed expert"][0])

    def forbidden(*_: Any) -> None:
        raise AssertionError("weights were materialised")

    monkeypatch.setattr("moeca_dist.checkpoints.load._materialise", forbidden)
    refused("has shape", path, **golden.options)


def test_a_checkpoint_without_shared_experts_is_a_model_without_them(golden: GoldenFile, tmp_path: Path) -> None:
    def drop_shared(state: State) -> None:
        for key in [key for key in state if "shared_experts" in key]:
            del state[key]

    model = load_model(damaged(golden, tmp_path / "bare.pt", drop_shared), **golden.options)
    assert model.spec.shared_width == 0
