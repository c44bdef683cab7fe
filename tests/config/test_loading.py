"""The configuration: precedence, paths, and one clear line for every kind of mistake."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moeca_dist.checkpoints.load import infer_spec
from moeca_dist.checkpoints.tensor_source import open_source
from moeca_dist.config import Config, load_config, validate_world
from moeca_dist.errors import UserError
from moeca_dist.models.registry import FAMILIES, build_model, published_spec

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- values ----------------------------------------------------------------------------------------------------------


def test_defaults_are_overridden_by_the_file_and_the_file_by_set(write) -> None:
    assert load_config(write("")) == Config()
    path = write("sampling: {num_steps: 10, batch_size: 4}\nmodel: {dtype: bfloat16}")
    config = load_config(path, ["sampling.num_steps=20", "parallel.ep_size=2", "sampling.num_steps=30"])
    assert (config.sampling.num_steps, config.sampling.batch_size, config.sampling.cfg_scale) == (30, 4, 1.5)
    assert (config.model.dtype, config.parallel.ep_size) == ("bfloat16", 2)


def test_empty_sections_and_null_ask_for_defaults(write) -> None:
    path = write("model:\n  # nothing yet\nsampling:\n  num_steps: 5\n  vae:\n")
    config = load_config(path, ["sampling.num_steps=null", "model.name="])
    assert config == Config()


def test_a_whole_section_can_be_set(write) -> None:
    config = load_config(write("model: {name: A}"), ["model={dtype: float16}"])
    assert (config.model.name, config.model.dtype) == ("A", "float16")


def test_exponents_and_anchors_are_read_as_people_mean_them(write) -> None:
    config = load_config(write("parallel: {timeout_s: 1e2}\nsampling: &s {num_steps: 3}\nmodel: {<<: {name: x}}"))
    assert (config.parallel.timeout_s, config.sampling.num_steps, config.model.name) == (100.0, 3, "x")


def test_paths_resolve_where_they_are_written(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("model: {checkpoint: ../weights/a.pt}\nsampling: {vae: /abs/vae}")
    assert load_config(path).model.checkpoint == tmp_path.parent / "weights/a.pt"
    assert load_config(path).sampling.vae == Path("/abs/vae")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(path, ["model.checkpoint=b.pt"]).model.checkpoint == elsewhere / "b.pt"
    assert load_config("../some.yaml").model.checkpoint == tmp_path.parent / "weights/a.pt"


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().model.dtype = "float16"


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        dict,
        steps=st.none() | st.integers(1, 10**6),
        scale=st.floats(1, 1e6),
        name=st.none() | st.text(string.ascii_letters + "-.#: '", min_size=1),
        timeout=st.floats(1e-6, 86_400),
        checkpoint=st.none() | st.text(string.ascii_letters + " #:", min_size=1),
    )
)
def test_the_saved_config_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    checkpoint = values["checkpoint"] and f"/{values['checkpoint']}"
    config = Config.model_validate(
        {
            "model": {"name": values["name"], "checkpoint": checkpoint},
            "parallel": {"timeout_s": values["timeout"]},
            "sampling": {"num_steps": values["steps"], "cfg_scale": values["scale"]},
        }
    )
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model: {chekpoint: a}", "unknown key model.chekpoint; did you mean model.checkpoint?"),
        ("sampling: {steps: 3}", "unknown key sampling.steps; did you mean sampling.num_steps?"),
        ("num_steps: 3", "unknown key num_steps; did you mean sampling.num_steps?"),
        ("model: {ep_size: 2}", "unknown key model.ep_size; did you mean parallel.ep_size?"),
        ("modell: {name: a}", "unknown key modell; did you mean model?"),
        ("zzz: 1", "unknown key zzz; known there are model, parallel, cache, sampling"),
        ("cache: {qqqq: 1}", "unknown key cache.qqqq; known there are policy"),
        ("7: 1", "unknown key 7; known"),
        ("model: {dtype: fp32}", "model.dtype must be 'float32', 'bfloat16' or 'float16', not 'fp32'"),
        ("cache: {policy: mocea}", "or 'random', not 'mocea'"),
        ("sampling: {num_steps: true}", "sampling.num_steps must be an integer, not True"),
        ("sampling: {num_steps: '5'}", "sampling.num_steps must be an integer, not '5'"),
        ("sampling: {num_steps: 0}", "sampling.num_steps must be greater than or equal to 1, not 0"),
        ("sampling: {cfg_scale: 0.9}", "sampling.cfg_scale must be greater than or equal to 1, not 0.9"),
        ("sampling: {cfg_scale: .nan}", "sampling.cfg_scale must be a finite number, not nan"),
        ("sampling: {batch_size: 0}", "sampling.batch_size must be greater"),
        ("parallel: {timeout_s: 0}", "parallel.timeout_s must be greater than 0, not 0"),
        ("parallel: {ep_size: -1}", "parallel.ep_size must be greater than or equal to 1, not -1"),
        ("model: {checkpoint: [a]}", "model.checkpoint must be a path, not ['a']"),
        ("model: 3", "model must be a section of keys (name, checkpoint, "),
        ("[1, 2]", "must hold sections of keys (model: ..., sampling: ...), not list"),
        ("model: {random_init: true}", "model.random_init needs model.name"),
        ("model: {random_init: true, name: a, checkpoint: b}", "model.random_init and model.checkpoint exclude"),
        ("model: {random_init: true, name: a, family: b}", "model.family has no effect with model.random_init"),
        ("model: {device: cpu}\nparallel: {backend: nccl}", "parallel.backend nccl needs model.device cuda"),
        ("model:\n  name: a\n  name: b", "some.yaml, line 3: invalid YAML: duplicate key name"),
        ("model: {name: a\nparallel: {}", "some.yaml, line 2: invalid YAML: "),
        ("model:\n\tname: a", "some.yaml, line 2: invalid YAML: "),
        ("model: !!python/object:os.system {}", "some.yaml, line 1: invalid YAML: could not determine"),
        ("? [a]\n: 1", "some.yaml, line 1: invalid YAML: a key must be a name"),
        ("model: \0", "some.yaml: invalid YAML: unacceptable character"),
    ],
)
def test_mistakes_in_the_file(write, text: str, found: str) -> None:
    path = write(text)
    assert found in message(path)
    assert message(path).startswith(str(path))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("parallel.epsize=2", "--set: unknown key parallel.epsize; did you mean parallel.ep_size?"),
        ("model.checkpoint.x=1", "--set: model.checkpoint must be a path"),
        ("model=3", "--set: model must be a section of keys"),
        ("model", "--set model: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("a..b=3", "--set a..b=3: expected key=value"),
        ("model.name=[", "--set model.name=[, line 1: invalid YAML"),
        ("sampling.cfg_scale=big", "--set: sampling.cfg_scale must be a number, not 'big'"),
    ],
)
def test_mistakes_in_an_override(write, override: str, found: str) -> None:
    assert found in message(write("model: {name: a}"), override)


def test_all_mistakes_are_told_at_once_with_their_place(write) -> None:
    path = write("model: {dtype: half}\nfoo: 1")
    text = message(path, "sampling.num_steps=-1")
    assert text == (
        f"{path}: model.dtype must be 'float32', 'bfloat16' or 'float16', not 'half'; "
        "unknown key foo; known there are model, parallel, cache, sampling, telemetry, quality; "
        "--set: sampling.num_steps must be greater than or equal to 1, not -1"
    )


def test_a_missing_file_names_its_neighbours(write, tmp_path: Path) -> None:
    path = write("")
    absent = tmp_path / "sone.yaml"
    assert (
        message(absent) == f"the config {absent} does not exist; did you mean {path}?; configs in {tmp_path}: some.yaml"
    )
    assert "configs in" in message(tmp_path / "q") and "did you mean" not in message(tmp_path / "q")
    assert f"nor does the folder {tmp_path / 'no'}" in message(tmp_path / "no/x.yaml")
    assert "is a folder" in message(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert message(path).startswith(f"cannot read the config file {path}: ")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "some.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(path)
    except UserError as error:
        assert str(error)


def test_ep_size_must_divide_the_world() -> None:
    validate_world(Config(), 7)
    config = Config.model_validate({"parallel": {"ep_size": 3}})
    validate_world(config, 6)
    with pytest.raises(UserError, match=r"parallel.ep_size 3 does not divide the world size 4; choose one of 1, 2, 4,"):
        validate_world(config, 4)


# ---- calibrated files ------------------------------------------------------------------------------------------------

CALIBRATED = (
    "cache: {policy: network_forecast, full_steps: [0, 4], order: 1, calibration: some.json}\n"
    "sampling: {num_steps: 8, cfg_scale: 1.5}"
)


@pytest.mark.parametrize(
    "override",
    [
        "sampling.num_steps=8",
        "sampling.batch_size=2",
        "cache.location=home",
        "cache.memory_limit=2GiB",
        "model.dtype=bfloat16",
    ],
)
def test_a_calibration_outlives_what_it_does_not_depend_on(write, override: str) -> None:
    cache = load_config(write(CALIBRATED), [override]).cache
    assert cache.calibration is not None and cache.full_steps == [0, 4] and cache.order == 1


@pytest.mark.parametrize(
    "override", ["sampling.num_steps=4", "sampling={cfg_scale: 1}", "cache.policy=taylorseer", "cache={interval: 2}"]
)
def test_a_calibration_goes_with_what_it_was_fitted_for(write, override: str) -> None:
    cache = load_config(write(CALIBRATED), [override, "model.dtype=bfloat16"]).cache
    assert (cache.calibration, cache.full_steps, cache.order) == (None, None, None)
    assert cache.policy == ("taylorseer" if "taylorseer" in override else "network_forecast")


def test_a_stated_calibration_stays(write) -> None:
    overrides = ["cache.full_steps=[0, 3]", "cache.calibration=/other.json"]
    cache = load_config(write(CALIBRATED), overrides).cache
    assert (cache.calibration, cache.full_steps) == (Path("/other.json"), [0, 3])


# ---- the shipped files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_parses_and_builds(path: Path) -> None:
    config = load_config(path)
    if config.model.checkpoint is None:
        assert config.model.name is not None
        spec = published_spec(config.model.name)
    else:
        spec = infer_spec(open_source(config.model.checkpoint), {})
    with torch.device("meta"):
        model = build_model(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_published_size_has_a_config_of_its_name() -> None:
    published = {name for family in FAMILIES.values() for name in family.published}
    assert len(published) == 13
    for name in published:
        assert load_config(CONFIGS / f"{name.lower()}.yaml").model.name == name
