"""Conversion: bit-equal in every direction, streamed, atomic; and sharded folders that are not whole are refused."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moeca_dist.checkpoints.convert import convert
from moeca_dist.checkpoints.load import load_model
from moeca_dist.checkpoints.safetensors_file import DTYPE_NAMES, SafetensorsFile, TensorInfo, write_safetensors
from moeca_dist.checkpoints.sharded import CONFIG_FILE, DENSE_FILE, INDEX_FILE, plan_files
from moeca_dist.checkpoints.tensor_source import open_source
from moeca_dist.errors import UserError
from tests.helpers.golden_files import GOLDEN_NAMES, GoldenFile, load_golden

FORMATS = {"sharded": "folder", "safetensors": "file.safetensors", "pt": "file.pt"}


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


@pytest.fixture
def folder(golden: GoldenFile, saved: Path, tmp_path: Path) -> Path:
    return convert(saved, tmp_path / "sharded", num_shards=4, **golden.options)


def contents(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return {key: source.get(key).clone() for key in source.infos}


def assert_bit_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key])]
    assert not different


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("to", FORMATS)
def test_round_trip_is_bit_equal(tmp_path: Path, name: str, to: Any) -> None:
    golden = load_golden(name)
    original = golden.write_checkpoint(tmp_path / "model.pt")
    there = convert(original, tmp_path / FORMATS[to], to=to, **golden.options)
    back = convert(there, tmp_path / "back.pt", to="pt")  # the converted file states the options itself
    assert_bit_equal(contents(there), dict(golden.state_dict))
    assert_bit_equal(contents(back), dict(golden.state_dict))
    assert load_model(back).spec == load_model(original, **golden.options).spec


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_every_format_converts_to_every_other(
    golden: GoldenFile, saved: Path, tmp_path: Path, first: Any, second: Any
) -> None:
    one = convert(saved, tmp_path / f"one-{FORMATS[first]}", to=first, **golden.options)
    two = convert(one, tmp_path / f"two-{FORMATS[second]}", to=second)
    assert_bit_equal(contents(two), dict(golden.state_dict))


def test_mixed_dtypes_survive(golden: GoldenFile, tmp_path: Path) -> None:
    state = {k: v.to(torch.bfloat16) if "experts" in k else v.to(torch.float16) for k, v in golden.state_dict.items()}
    torch.save(state, tmp_path / "mixed.pt")
    converted = convert(tmp_path / "mixed.pt", tmp_path / "folder", **golden.options)
    assert_bit_equal(contents(converted), state)


@pytest.mark.parametrize("to", FORMATS)
def test_dtype_casts_all_but_the_fp32_router(golden: GoldenFile, saved: Path, tmp_path: Path, to: Any) -> None:
    converted = convert(saved, tmp_path / FORMATS[to], to=to, dtype="bfloat16", **golden.options)
    expected = {k: v if ".mlp.gate." in k else v.to(torch.bfloat16) for k, v in golden.state_dict.items()}
    assert_bit_equal(contents(converted), expected)


def test_published_readers_find_the_weights(golden: GoldenFile, saved: Path, folder: Path, tmp_path: Path) -> None:
    """The official codes take ``ema`` from a .pt; the safetensors library reads ours, shard by shard."""
    pt = convert(folder, tmp_path / "back.pt", to="pt")
    assert_bit_equal(torch.load(pt, weights_only=True)["ema"], dict(golden.state_dict))
    index = json.loads((folder / INDEX_FILE).read_text())
    merged: dict[str, Tensor] = {}
    for name in set(index["weight_map"].values()):
        shard = load_file(folder / name)
        assert all(index["weight_map"][key] == name for key in shard)
        merged |= shard
    assert_bit_equal(merged, dict(golden.state_dict))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


def test_shards_hold_ranges_of_experts(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    folder = convert(saved, tmp_path / "three", num_shards=3, **golden.options)
    held = [
        sorted(
            {int(key.split(".")[5]) for key in SafetensorsFile(folder / f"experts-{i:05d}-of-00003.safetensors").infos}
        )
        for i in range(3)
    ]
    assert held == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert not any("experts.blocks" in key for key in SafetensorsFile(folder / DENSE_FILE).infos)


@given(num_experts=st.integers(1, 64), num_shards=st.integers(1, 80))
def test_plan_gives_every_file_a_run_of_experts(num_experts: int, num_shards: int) -> None:
    expert_of_key = {f"e{expert}": expert for expert in range(num_experts)}
    files = plan_files(["dense", *expert_of_key], expert_of_key, num_experts, num_shards)
    assert files.pop(DENSE_FILE) == ["dense"]
    sizes = [len(keys) for keys in files.values()]
    assert len(files) == min(num_shards, num_experts) and max(sizes) - min(sizes) <= 1
    assert [key for keys in files.values() for key in keys] == list(expert_of_key)


# ---- the safetensors writer ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=6
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_writer_is_read_by_the_library(tmp_path: Path, tensors: list[Any], metadata: dict[str, str]) -> None:
    state = {f"key.{i} é": _bits(dtype, shape, seed=i) for i, (dtype, shape) in enumerate(tensors)}
    path = tmp_path / "written.safetensors"
    write_safetensors(path, {key: TensorInfo.of(tensor) for key, tensor in state.items()}, state.__getitem__, metadata)
    assert_bit_equal(load_file(path), state)
    assert SafetensorsFile(path).metadata == metadata


def _bits(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=draw).to(dtype)


def test_writer_takes_transposed_tensors_and_checks_shapes(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    info = {"a": TensorInfo(torch.float32, (3, 2))}
    write_safetensors(tmp_path / "t.safetensors", info, lambda _: tensor.T, {})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], tensor.T)
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "u.safetensors", info, lambda _: tensor, {})


def test_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(_: str) -> Tensor:
        nonlocal most
        most = max(most, len(alive))
        tensor = torch.ones(8)
        alive.add(tensor)
        return tensor

    write_safetensors(tmp_path / "s.safetensors", {f"{i}": TensorInfo(torch.float32, (8,)) for i in range(9)}, read, {})
    assert most <= 1  # the previous tensor may still be held while the next is read


# ---- targets ---------------------------------------------------------------------------------------------------------


def refused(match: str, src: Path, dst: Path, **settings: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        convert(src, dst, **settings)
    assert "\n" not in str(caught.value)


def listing(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


def test_existing_target_needs_overwrite(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    for to, name in FORMATS.items():
        target = tmp_path / name
        convert(saved, target, to=to, **golden.options)
        before = listing(tmp_path)
        refused("exists: choose another target, or overwrite", saved, target, to=to, **golden.options)
        assert listing(tmp_path) == before
        shards = {"num_shards": 2} if to == "sharded" else {}
        convert(saved, target, to=to, overwrite=True, dtype="float16", **shards, **golden.options)
        assert open_source(target).dtypes["x_embedder.proj.weight"] == torch.float16
    assert len(list((tmp_path / FORMATS["sharded"]).glob("experts-*"))) == 2  # nothing of the old one is left


def test_empty_folder_is_a_target(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert load_model(convert(saved, tmp_path / "new", **golden.options)).spec.depth == 4


def test_foreign_folder_is_never_overwritten(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    refused("something else than a sharded checkpoint", saved, home, overwrite=True, **golden.options)
    (tmp_path / "file.pt").mkdir()
    refused("something else than a pt checkpoint", saved, tmp_path / "file.pt", to="pt", overwrite=True)
    assert (home / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("out", {"to": "onnx"}, "unknown checkpoint format 'onnx': choose one of sharded, safetensors, pt"),
        ("out.bin", {"to": "pt"}, r"end its name in \.pt or \.pth"),
        ("out", {"to": "safetensors"}, r"end its name in \.safetensors"),
        ("model.pt", {"to": "pt", "overwrite": True}, "overlaps the source"),
        ("model.pt/below", {}, "overlaps the source"),
        ("out", {"num_shards": 0}, "num_shards is 0"),
        ("out.pt", {"to": "pt", "num_shards": 2}, "num_shards has no effect on a pt file"),
        ("out", {"dtype": "int4"}, "choose one of float32, bfloat16, float16"),
        ("out", {"num_head": 2}, "did you mean num_heads"),
    ],
)
def test_bad_request_writes_nothing(
    golden: GoldenFile, saved: Path, tmp_path: Path, name: str, settings: dict[str, Any], match: str
) -> None:
    refused(match, saved, tmp_path / name, **golden.options | settings)
    assert listing(tmp_path) == {"model.pt"}


def test_failed_write_leaves_nothing(
    golden: GoldenFile, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeca_dist.checkpoints.sharded.Path.write_text", full_disk)
    refused("cannot write .*No space left", saved, tmp_path / "out", **golden.options)
    assert listing(tmp_path) == {"model.pt"}


def test_target_below_a_file_is_refused(golden: GoldenFile, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("not a folder")
    refused("cannot write", saved, tmp_path / "note" / "out", **golden.options)


# ---- sharded folders that are not whole ------------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


SHARD = "experts-00002-of-00004.safetensors"
KEY = "blocks.1.mlp.experts.blocks.4.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), rf"{SHARD} is missing"),
    "truncated shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-5]), rf"{SHARD} has \d+ bytes"),
    "missing index": (lambda f: (f / INDEX_FILE).unlink(), rf"holds no {INDEX_FILE}.*dense\.safetensors"),
    "index is no JSON": (lambda f: (f / INDEX_FILE).write_text("{"), "is not readable JSON"),
    "index is binary": (lambda f: (f / INDEX_FILE).write_bytes(b"\xff\xfe\x00"), "is not readable JSON"),
    "index is a list": (lambda f: (f / INDEX_FILE).write_text("[]"), "holds no JSON object"),
    "index without map": (lambda f: edit_index(f, lambda i: i.pop("weight_map")), "not an index written by"),
    "index without tensors": (lambda f: edit_index(f, lambda i: i["metadata"].pop("tensors")), "not an index"),
    "index with a null": (lambda f: edit_index(f, lambda i: i.update(metadata=None)), "not an index"),
    "unmapped key": (lambda f: edit_index(f, lambda i: i["weight_map"].pop(KEY)), "name different tensors"),
    "file outside": (
        lambda f: edit_index(f, lambda i: i["metadata"]["file_sizes"].update({"../model.pt": 1})),
        "a file outside the folder",
    ),
    "key in another file": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({KEY: DENSE_FILE})),
        "as the index",
    ),
    "config is no JSON": (lambda f: (f / CONFIG_FILE).write_text("nope"), "is not readable JSON"),
    "config of nothing": (lambda f: (f / CONFIG_FILE).write_text("{}"), "states family None"),
    "config without depth": (
        lambda f: (f / CONFIG_FILE).write_text('{"family": "dsmoe"}'),
        "does not describe a dsmoe network",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_incomplete_folder_is_refused(folder: Path, fault: str) -> None:
    damage, match = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_shard_of_another_checkpoint_is_noticed(golden: GoldenFile, folder: Path) -> None:
    """Right name and size, wrong content: the shard's own header disagrees with the index."""
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes().replace(b"blocks.4.", b"blocks.9."))
    with pytest.raises(UserError, match=rf"{SHARD} does not hold {KEY.split('.up')[0]}"):
        load_model(folder)


def test_folder_without_config_is_inferred_from_shapes(golden: GoldenFile, folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    assert load_model(folder, **golden.options).spec.num_experts == 8
    with pytest.raises(UserError, match="num_heads"):
        load_model(folder)


def test_repository_folder_suggests_its_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0700000.pt").touch()
    with pytest.raises(UserError, match=r"e\.g\. .*0700000\.pt"):
        load_model(tmp_path)
