"""The command line: what it writes, and how every mistake ends (one line, its exit code, nothing written)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moeca_dist import PeerLostError, UserError
from moeca_dist.cli import generate_main, main
from moeca_dist.cli.arguments import parse_labels
from moeca_dist.config import load_config
from moeca_dist.report.schema import describe_requests
from moeca_dist.types import Request
from tests.helpers.golden_files import load_golden
from tests.helpers.ranks import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run.yaml`` with a small latent DSMoE of ten classes in the original layout, ``model.pt``."""
    folder = tmp_path_factory.mktemp("cli")
    golden = load_golden("dsmoe_e8")
    golden.write_checkpoint(folder / "model.pt")
    options = "".join(f"  {name}: {value}\n" for name, value in golden.options.items())
    (folder / "run.yaml").write_text(
        f"model:\n  checkpoint: model.pt\n  device: cpu\n{options}sampling:\n  num_steps: 2\n"
    )
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and other ranks that do not wait for rank 0."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moeca_dist.cli.exit_codes.FIRST_RANK_LEAD_S", 0.0)


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2, run=main) -> str:
    """The one line that ``argv`` is refused with."""
    assert run(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0].removeprefix("error: ")


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_writes_samples_and_a_summary(folder: Path, out: Path, capsys) -> None:
    argv = ["generate", "--config", str(folder / "run.yaml"), "--out", str(out), "--num-images", "3"]
    assert main([*argv, "--labels", "7,1-2", "--seed", "5", "--set", "sampling.batch_size=2"]) == 0
    latents = np.load(out / "latents.npz")["arr_0"]
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == np.float32
    assert load_config(out / "config.yaml").sampling.batch_size == 2
    requests = [Request(0, 7, 5), Request(1, 1, 5), Request(2, 2, 5)]
    assert json.loads((out / "report.json").read_text())["requests"] == describe_requests(requests)
    printed = capsys.readouterr().out
    assert "images" in printed and str(out / "latents.npz") in printed and "sd-vae-ft-mse" in printed
    # Labels are used in turn, and another batch size, entry point or run gives the same samples.
    assert generate_main([*argv[1:], "--labels", "7,1,2", "--seed", "5", "--local_rank=0", "--overwrite"]) == 0
    assert np.allclose(np.load(out / "latents.npz")["arr_0"], latents, atol=1e-5)
    assert generate_main([*argv[1:], "--labels", "7", "--seed", "5", "--overwrite"]) == 0
    relabelled = np.load(out / "latents.npz")["arr_0"]
    assert np.allclose(relabelled[0], latents[0], atol=1e-5) and not np.allclose(relabelled[1], latents[1], atol=1e-2)


BAD_GENERATE = {
    "no config": (["--config", ""], "the config "),
    "absent config": (["--config", "absent.yaml"], "absent.yaml does not exist"),
    "unknown key": (
        ["--set", "sampling.steps=3"],
        "--set: unknown key sampling.steps; did you mean sampling.num_steps?",
    ),
    "wrong value": (["--set", "model.dtype=fp8"], "--set: model.dtype must be 'float32'"),
    "world": (["--set", "parallel.ep_size=2"], "parallel.ep_size 2 does not divide the world size 1"),
    "no weights": (["--set", "model.checkpoint="], "no weights to generate with: set model.checkpoint"),
    "absent checkpoint": (["--set", "model.checkpoint=/absent.pt"], "/absent.pt does not exist"),
    "other model": (["--set", "model.name=DSMoE-S-E16"], "is not DSMoE-S-E16"),
    "unknown model": (["--set", "model.name=DSMoE-S"], "no published model is called 'DSMoE-S'"),
    "no images": (["--num-images", "0"], "argument --num-images: '0' is not an integer of at least 1"),
    "many images": (["--num-images", "ten"], "argument --num-images: 'ten' is not an integer"),
    "seed": (["--seed", "-1"], "argument --seed: '-1' is not an integer in 0..4294967295"),
    "high label": (["--labels", "3-10"], "label 10 is out of range: this model has 10 classes, 0-9"),
    "endless labels": (["--labels", "0-99999999999999"], "label 99999999999999 is out of range"),
    "label syntax": (["--labels", "3;4"], "argument --labels: '3;4' is no list of labels such as 0-9 or 1,3,7-9"),
    "backward labels": (["--labels", "9-0"], "argument --labels: 9-0 runs backwards; write 0-9"),
    "negative label": (["--labels=-1"], "argument --labels: '-1' is no list of labels"),
    "unknown option": (["--num-image", "3"], "unknown argument --num-image; did you mean --num-images?"),
    "stray word": (["more"], "unknown argument more; see moeca generate --help"),
    "vae": (["--set", "sampling.vae=/absent"], "/absent"),
}


@pytest.mark.parametrize(("argv", "found"), BAD_GENERATE.values(), ids=BAD_GENERATE.keys())
def test_generate_refuses(folder: Path, out: Path, capsys, argv: list[str], found: str) -> None:
    line = refuse(capsys, ["generate", "--config", str(folder / "run.yaml"), "--out", str(out), *argv])
    assert found in line
    assert not list(out.parent.iterdir())


def test_generate_refuses_an_incomplete_command(capsys) -> None:
    assert "the following arguments are required: --config, --out (see moeca generate" in refuse(capsys, ["generate"])
    assert "required: COMMAND" in refuse(capsys, [])
    assert "invalid choice: 'genrate'" in refuse(capsys, ["genrate"])


def test_generate_refuses_occupied_outputs(folder: Path, out: Path, capsys) -> None:
    argv = ["generate", "--config", str(folder / "run.yaml"), "--num-images", "1", "--out"]
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert "is not empty: choose another one, or pass --overwrite" in refuse(capsys, [*argv, str(out)])
    assert "holds something else than an earlier run" in refuse(capsys, [*argv, str(out), "--overwrite"])
    assert "is a file" in refuse(capsys, [*argv, str(out / "mine.txt")])
    refuse(capsys, [*argv, str(out / "mine.txt" / "below")])
    assert [path.name for path in out.parent.rglob("*")] == ["out", "mine.txt"]


def test_only_the_first_rank_speaks(folder: Path, out: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    argv = ["--config", str(folder / "run.yaml"), "--out", str(out), "--set", "parallel.ep_size=3"]
    assert generate_main(argv) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert "choose one of 1, 2, 4" in refuse(capsys, argv, run=generate_main)
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE is 'many'" in refuse(capsys, argv, run=generate_main)


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (PeerLostError("rank 1 is gone"), 1, "error: rank 1 is gone\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops\n"),
    ],
)
def test_outcomes_become_exit_codes(folder: Path, out: Path, capsys, monkeypatch, error, code: int, shown: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("moeca_dist.cli.generate.run_generate", fail)
    assert generate_main(["--config", str(folder / "run.yaml"), "--out", str(out)]) == code
    printed = capsys.readouterr().err
    assert printed.endswith(shown) and ("Traceback" in printed) == (shown.startswith("Zero"))


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_leaves_nothing(folder: Path, out: Path, capsys, monkeypatch, error: BaseException) -> None:
    from moeca_dist.runtime.output_folder import OutputFolder

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(OutputFolder, "finish", fail)
    argv = ["--config", str(folder / "run.yaml"), "--out", str(out), "--num-images", "1"]
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            generate_main(argv)
    else:
        assert generate_main(argv) in (1, 130)
    assert not list(out.parent.iterdir())


def test_parse_labels() -> None:
    labels = [label for part in parse_labels("1, 3,7-9,1") for label in part]
    assert labels == [1, 3, 7, 8, 9, 1]


# ---- convert ---------------------------------------------------------------------------------------------------------


def test_convert_follows_the_ending(folder: Path, tmp_path: Path, capsys) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in load_golden("dsmoe_e8").options.items()]
    sharded, single = tmp_path / "sharded", tmp_path / "single.safetensors"
    assert main(["convert", str(folder / "model.pt"), str(sharded), "--shards", "2", *options]) == 0
    assert sharded.is_dir() and str(sharded) in capsys.readouterr().out
    # The options are stored: the second conversion needs none.
    assert main(["convert", str(sharded), str(single), "--dtype", "bfloat16"]) == 0
    assert single.is_file()


def test_convert_refuses(folder: Path, tmp_path: Path, capsys) -> None:
    source = str(folder / "model.pt")
    assert "absent.pt does not exist" in refuse(capsys, ["convert", "absent.pt", str(tmp_path / "a")])
    assert "--shards has no effect" in refuse(capsys, ["convert", source, str(tmp_path / "a.pt"), "--shards", "2"])
    assert "--shards: '0' is not" in refuse(capsys, ["convert", source, str(tmp_path / "a"), "--shards", "0"])
    assert "--num-heads: invalid int value" in refuse(capsys, ["convert", source, str(tmp_path), "--num-heads", "x"])
    assert "--to: invalid choice" in refuse(capsys, ["convert", source, str(tmp_path / "a"), "--to", "gguf"])
    assert not list(tmp_path.iterdir())


# ---- as processes ----------------------------------------------------------------------------------------------------


def test_a_config_error_needs_no_torch(folder: Path, out: Path) -> None:
    program = (
        "import sys; from moeca_dist.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules; sys.exit(code)"
    )
    argv = ["generate", "--config", str(folder / "run.yaml"), "--out", str(out), "--set", "model.dtyp=float16"]
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set: unknown key model.dtyp; did you mean model.dtype?\n"


def test_two_ranks_refuse_together(folder: Path, out: Path) -> None:
    """A mistake that only the checkpoint reveals: both ranks stop with exit code 2, one line in all, no traceback."""
    ranks = start_ranks(folder, out, "--labels", "0-10")
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    lines = [line for output in outputs for line in output.splitlines() if "Setting accelerator" not in line]
    assert lines == ["error: label 10 is out of range: this model has 10 classes, 0-9"]
    assert not list(out.parent.iterdir())


def test_sigterm_leaves_nothing(folder: Path, out: Path) -> None:
    ranks = start_ranks(folder, out, "--set", "sampling.num_steps=1000000", count=1)
    deadline = time.monotonic() + 120
    while not list(out.parent.iterdir()) and time.monotonic() < deadline:
        assert ranks[0].poll() is None
        time.sleep(0.05)
    ranks[0].terminate()
    output = ranks[0].communicate(timeout=60)[0]
    assert ranks[0].returncode == 143 and "Traceback" not in output
    assert not list(out.parent.iterdir())


def start_ranks(folder: Path, out: Path, *argv: str, count: int = 2) -> list[subprocess.Popen[str]]:
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "launch/generate.py", "--config", str(folder / "run.yaml"), "--out", str(out), *argv]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def test_a_table_of_experts_from_a_recorded_run(folder: Path, tmp_path: Path, capsys) -> None:
    trace, table = tmp_path / "routing.npz", tmp_path / "placement.json"
    assert main(["trace", "--config", str(folder / "run.yaml"), "--num-images", "2", "--out", str(trace)]) == 0
    place = ["place", str(trace), "--ranks", "2", "--replicas", "1", "--out", str(table)]
    assert main(place) == 0
    printed = capsys.readouterr().out
    assert "a rank holds up to 5 of the 8 experts of a block, 4 without replicas" in printed
    assert f"{trace}: 0." in printed and "of the bytes of equal runs" in printed
    copies = json.loads(table.read_text())["replicated"]
    assert all(len(experts) == 1 for experts in copies.values())
    assert "--overwrite" in refuse(capsys, place)
    assert "it has 8: take fewer" in refuse(capsys, [*place, "--overwrite", "--replicas", "9"])
    assert json.loads(table.read_text())["replicated"] == copies
