"""``moeca evaluate``: every kind of input, what it writes, and how every mistake ends.

Shape suffixes: N images, H and W pixels, C channels, F features.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moeca_dist.cli import main
from moeca_dist.demo.data import real_digits
from moeca_dist.demo.judge import features
from moeca_dist.evaluation import evaluate as evaluation
from moeca_dist.evaluation.distribution import Gaussian, frechet_distance
from moeca_dist.report.schema import describe_requests
from moeca_dist.types import Request
from tests.helpers.inception_files import write_script

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def other(images_NHWC: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-30, 31, images_NHWC.shape)
    return (images_NHWC.astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``images.npz`` and ``reference.npz``: 130 digits, so that a set takes several chunks."""
    digits_NHWC = real_digits()[:130]
    np.savez(tmp_path / "images.npz", other(digits_NHWC))
    np.savez(tmp_path / "reference.npz", digits_NHWC)
    return tmp_path


def run(folder: Path, *argv: str) -> dict[str, Any]:
    """What ``evaluation.json`` holds after the command."""
    out = folder / "result.json"
    assert main(["evaluate", *argv, "--out", str(out), "--resamples", "20"]) == 0
    found = json.loads(out.read_text())
    out.unlink()
    return found


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that it is refused with."""
    assert main(["evaluate", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0].removeprefix("error: ")


def write_pictures(folder: Path, images_NHWC: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for index, pixels in enumerate(images_NHWC):
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / f"{index:06d}.png")


def write_run(folder: Path, images_NHWC: np.ndarray, **requests: Any) -> None:
    """An output folder of ``moeca generate``, as far as it matters here."""
    folder.mkdir(parents=True)
    np.savez(folder / "samples.npz", images_NHWC)
    (folder / "report.json").write_text(json.dumps({"requests": requests} if requests else {}))


# ---- results ---------------------------------------------------------------------------------------------------------


def test_table_and_file_say_the_same(folder: Path, capsys) -> None:
    images, reference = str(folder / "images.npz"), str(folder / "reference.npz")
    assert main(["evaluate", images, "--reference", reference, "--features", "digits", "--resamples", "20"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "evaluation.json").read_text())
    assert "(130 images of 16 x 16 x 1)" in printed and str(folder / "evaluation.json") in printed
    assert list(found["figures"]) == [
        *("psnr_db", "pooled_psnr_db", "ssim", "rel_l2", "frechet", "sfid", "inception_score", "precision", "recall")
    ]
    for name, figure in found["figures"].items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
    assert f"{found['figures']['psnr_db']['value']:.2f}  [" in printed
    assert found["paired"] is True and found["features"] == "digits" and found["images"]["shape"] == [16, 16, 1]
    assert found["bootstrap"] == {"resamples": 20, "seed": 0, "confidence": 0.95}
    assert "seeds and labels were not compared" in found["notes"][0] and found["notes"][0] in printed
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "images.npz", "reference.npz"]


def test_figures_do_not_depend_on_the_number_of_workers(folder: Path) -> None:
    argv = [str(folder / "images.npz"), "--reference", str(folder / "reference.npz"), "--features", "digits"]
    assert run(folder, *argv, "--workers", "2") == run(folder, *argv)


def test_all_kinds_of_input_give_the_same_figures(folder: Path) -> None:
    reference = str(folder / "reference.npz")
    images_NHWC = np.load(folder / "images.npz")["arr_0"]
    np.savez_compressed(folder / "compressed.npz", images_NHWC)
    write_pictures(folder / "pictures", images_NHWC)
    write_run(folder / "run", images_NHWC)
    write_pictures(folder / "unpacked" / "images", images_NHWC)
    expected = run(folder, str(folder / "images.npz"), "--reference", reference)["figures"]
    for kind in ("compressed.npz", "pictures", "run", "unpacked"):
        assert run(folder, str(folder / kind), "--reference", reference)["figures"] == expected, kind


def test_a_compared_run_is_its_own_reference(folder: Path) -> None:
    images_NHWC = real_digits()[:10]
    write_run(folder / "run", other(images_NHWC), seeds=[3], sha256="a")
    (folder / "run" / "uncached").mkdir()
    np.savez(folder / "run" / "uncached" / "samples.npz", images_NHWC)
    found = run(folder, str(folder / "run"))
    assert found["reference"]["path"].endswith("uncached/samples.npz") and found["notes"] == []
    assert main(["evaluate", str(folder / "run"), "--resamples", "0"]) == 0
    assert (folder / "run" / "evaluation.json").is_file()


def test_sets_are_compared_with_others_of_another_count(folder: Path) -> None:
    images = str(folder / "images.npz")
    found = run(folder, images, "--reference", "real-digits", "--unpaired", "--features", "digits")
    expected = frechet_distance(
        *(Gaussian.fit(features(images_NHWC)) for images_NHWC in (np.load(images)["arr_0"], real_digits()))
    )
    assert found["figures"]["frechet"]["value"] == pytest.approx(expected, rel=1e-6)
    assert found["reference"]["count"] == 1797 and "psnr_db" not in found["figures"]


def test_statistics_stand_in_for_the_images_of_a_reference(folder: Path, capsys) -> None:
    """As in ADM's reference files: mu and sigma of the whole data set, of which arr_0 holds a part."""
    images = str(folder / "images.npz")
    real = Gaussian.fit(features(real_digits()))
    np.savez(folder / "adm.npz", mu=real.mean_F, sigma=real.factor_RF.T @ real.factor_RF, arr_0=real_digits()[:200])
    np.savez(folder / "bare.npz", mu=real.mean_F, sigma=real.factor_RF.T @ real.factor_RF)
    options = ("--unpaired", "--features", "digits")
    full = run(folder, images, "--reference", "real-digits", *options)
    part = run(folder, images, "--reference", str(folder / "adm.npz"), *options)
    bare = run(folder, images, "--reference", str(folder / "bare.npz"), *options)
    for found in (part, bare):
        assert found["figures"]["frechet"]["value"] == pytest.approx(full["figures"]["frechet"]["value"], rel=1e-9)
    assert "precision" in part["figures"] and list(bare["figures"]) == ["frechet", "inception_score"]
    assert len(bare["notes"]) == 2 and "precision_recall is not measured: it needs the images" in bare["notes"][1]
    capsys.readouterr()
    argv = (images, "--reference", str(folder / "bare.npz"))
    assert "holds statistics, which have no pairs: add --unpaired" in refuse(capsys, *argv)
    assert "sfid needs mu_s and sigma_s" in refuse(capsys, *argv, *options, "--metrics", "frechet,sfid")
    assert "give it as --reference" in refuse(capsys, str(folder / "bare.npz"), "--reference", images)


def test_statistics_of_another_network_are_refused(folder: Path, capsys) -> None:
    np.savez(folder / "adm.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "torn.npz", mu=np.zeros(5), sigma=np.eye(6))
    options = ("--unpaired", "--features", "digits", "--metrics", "frechet")
    for name, line in (("adm", "keeps statistics of 5 features, digits has 64"), ("torn", "mu [5] and sigma [6, 6]")):
        argv = [str(folder / "images.npz"), "--reference", str(folder / f"{name}.npz"), *options]
        assert main(["evaluate", *argv]) == 2
        assert line in capsys.readouterr().err


def test_an_inception_file_measures_colour_images(tmp_path: Path) -> None:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", other(images_NHWC))
    np.savez(tmp_path / "reference.npz", images_NHWC)
    script = write_script(tmp_path / "inception.pt")
    argv = [str(tmp_path / "images.npz"), "--reference", str(tmp_path / "reference.npz"), "--features", str(script)]
    found = run(tmp_path, *argv, "--resamples", "2")
    assert set(found["figures"]) >= {"psnr_db", "frechet", "sfid", "inception_score", "precision", "recall"}


def test_infinite_figures_are_null(tmp_path: Path) -> None:
    np.savez(tmp_path / "black.npz", np.zeros((2, 4, 4, 1), dtype=np.uint8))
    np.savez(tmp_path / "white.npz", np.full((2, 4, 4, 1), 255, dtype=np.uint8))
    found = run(tmp_path, str(tmp_path / "white.npz"), "--reference", str(tmp_path / "black.npz"))
    assert found["figures"]["rel_l2"] == {"value": None, "low": None, "high": None}


def test_launch_script_is_the_command(folder: Path) -> None:
    argv = [str(folder / "images.npz"), "--reference", str(folder / "reference.npz"), "--metrics", "psnr"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "evaluate.py", *argv], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0 and "PSNR" in done.stdout, done.stderr


# ---- mistakes --------------------------------------------------------------------------------------------------------

IMAGES, REFERENCE = "{folder}/images.npz", "{folder}/reference.npz"
BAD = {
    "absent": (["{folder}/absent.npz", "--reference", REFERENCE], "absent.npz does not exist: give an output folder"),
    "no reference": ([IMAGES], "has no uncached images: say what to compare with --reference"),
    "absent reference": ([IMAGES, "--reference", "{folder}/absent"], "absent does not exist"),
    "empty": (["{folder}/empty", "--reference", REFERENCE], "holds neither samples.npz nor pictures"),
    "latents": (["{folder}/latents", "--reference", REFERENCE], "holds latents, not pictures"),
    "text": (["{folder}/text.npz", "--reference", REFERENCE], "cannot read {folder}/text.npz: File is not a zip file"),
    "float": (["{folder}/float.npz", "--reference", REFERENCE], "is float32 [4, 16, 16, 1]: images are uint8"),
    "nameless": (["{folder}/named.npz", "--reference", REFERENCE], "has no array arr_0"),
    "size": ([IMAGES, "--reference", "{folder}/large.npz"], "the images differ in size: "),
    "count": ([IMAGES, "--reference", "{folder}/few.npz"], "130 images have 3 references: generate the reference"),
    "samples": (
        ["{folder}/few.npz", "--reference", "real-digits", "--unpaired", "--features", "digits"],
        "precision_recall needs at least 4 images, {folder}/few.npz has 3",
    ),
    "one sample": (
        ["{folder}/one.npz", "--reference", "{folder}/one.npz", "--features", "digits"],
        "frechet needs at least 2 images, {folder}/one.npz has 1",
    ),
    "nothing to measure": ([IMAGES, "--reference", REFERENCE, "--unpaired"], "add --features digits or an Inception"),
    "pairs of none": (
        [IMAGES, "--reference", REFERENCE, "--unpaired", "--features", "digits", "--metrics", "psnr"],
        "psnr compares pairs: leave it or --unpaired away",
    ),
    "no network": ([IMAGES, "--reference", REFERENCE, "--metrics", "sfid"], "sfid needs a feature network"),
    "idle network": (
        [IMAGES, "--reference", REFERENCE, "--metrics", "psnr", "--features", "digits"],
        "--features has no effect on these --metrics",
    ),
    "idle device": ([IMAGES, "--reference", REFERENCE, "--device", "cuda"], "--device has no effect without a network"),
    "absent network": ([IMAGES, "--reference", REFERENCE, "--features", "absent.pt"], "absent.pt does not exist"),
    "other network": (
        ["{folder}/large.npz", "--reference", "{folder}/large.npz", "--features", "digits"],
        "--features digits reads images of 16 x 16 x 1, not 32 x 32 x 1",
    ),
    "unweighted lpips": ([IMAGES, "--reference", REFERENCE, "--metrics", "lpips"], "lpips needs weights: add --lpips"),
    "absent lpips": ([IMAGES, "--reference", REFERENCE, "--lpips", "absent.pth"], "absent.pth does not exist"),
    "unpaired lpips": (
        [IMAGES, "--reference", REFERENCE, "--unpaired", "--features", "digits", "--lpips", "a"],
        "--lpips compares pairs",
    ),
    "unknown metric": ([IMAGES, "--reference", REFERENCE, "--metrics", "psnr,fid"], "'fid' is none of psnr, ssim"),
    "resamples": ([IMAGES, "--reference", REFERENCE, "--resamples", "1"], "'1' is neither 0 nor an integer of at"),
    "workers": ([IMAGES, "--reference", REFERENCE, "--workers", "0"], "'0' is not an integer of at least 1"),
    "place": ([IMAGES, "--reference", REFERENCE, "--out", "{folder}/no/a.json"], "{folder}/no does not exist: create"),
    "folder": ([IMAGES, "--reference", REFERENCE, "--out", "{folder}"], "{folder} is a folder: name a file with --out"),
    "abbreviation": ([IMAGES, "--referenc", REFERENCE], "unknown argument --referenc; did you mean --reference?"),
}


@pytest.mark.parametrize(("argv", "found"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_one_line(folder: Path, capsys, argv: list[str], found: str) -> None:
    digits_NHWC = real_digits()
    (folder / "empty").mkdir()
    (folder / "latents").mkdir()
    np.savez(folder / "latents" / "latents.npz", np.zeros((2, 4, 8, 8), dtype=np.float32))
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "float.npz", np.zeros((4, 16, 16, 1), dtype=np.float32))
    np.savez(folder / "named.npz", images=digits_NHWC[:4])
    np.savez(folder / "large.npz", digits_NHWC[:130].repeat(2, axis=1).repeat(2, axis=2))
    np.savez(folder / "few.npz", digits_NHWC[:3])
    np.savez(folder / "one.npz", digits_NHWC[:1])
    before = sorted(folder.rglob("*"))
    line = refuse(capsys, *(word.format(folder=folder) for word in argv))
    assert found.format(folder=folder) in line
    assert sorted(folder.rglob("*")) == before


def test_references_of_other_seeds_and_labels_are_refused(folder: Path, capsys) -> None:
    images_NHWC = real_digits()[:4]
    for name, label, seed in (("run", 0, 1), ("same", 0, 1), ("seed", 0, 2), ("labels", 5, 1)):
        requests = describe_requests([Request(index, label, seed) for index in range(4)])
        write_run(folder / name, images_NHWC, **requests)
    run_folder = str(folder / "run")
    assert run(folder, run_folder, "--reference", str(folder / "same"))["notes"] == []
    capsys.readouterr()
    line = refuse(capsys, run_folder, "--reference", str(folder / "seed"))
    assert "the images are of seed 1, their references of seed 2: generate the reference with the same --seed" in line
    assert "differ in labels or order" in refuse(capsys, run_folder, "--reference", str(folder / "labels"))


def test_pictures_without_a_counterpart_and_of_other_sizes_are_refused(folder: Path, capsys) -> None:
    digits_NHWC = real_digits()[:3]
    for name in ("pictures", "renamed", "mixed"):
        write_pictures(folder / name, digits_NHWC)
    (folder / "renamed" / "000002.png").rename(folder / "renamed" / "000007.png")
    Image.new("L", (16, 17)).save(folder / "mixed" / "000002.png")
    images = str(folder / "pictures")
    assert "000002 is a picture in only one of" in refuse(capsys, images, "--reference", str(folder / "renamed"))
    assert main(["evaluate", images, "--reference", str(folder / "mixed")]) == 2
    assert "000002.png is [17, 16, 1], 000000.png is [16, 16, 1]" in capsys.readouterr().err
    (folder / "mixed" / "000002.png").write_text("no picture")
    assert main(["evaluate", images, "--reference", str(folder / "mixed")]) == 2
    assert "000002.png: cannot identify image file" in capsys.readouterr().err.replace("cannot read ", "", 1)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_damaged_file_is_a_mistake_also_in_a_worker(folder: Path, capsys, workers: str) -> None:
    """The header promises more images than the archive holds."""
    header = (np.load(folder / "images.npz")["arr_0"], folder / "short.npz")
    np.save(folder / "arr_0.npy", header[0])
    content = (folder / "arr_0.npy").read_bytes()
    with zipfile.ZipFile(folder / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", content[: len(content) // 2])
    argv = [str(folder / "short.npz"), "--reference", str(folder / "reference.npz"), "--workers", workers]
    assert main(["evaluate", *argv]) == 2
    assert "short.npz: it ends too early; write it again" in capsys.readouterr().err


def test_nothing_half_written_replaces_an_earlier_result(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (folder / "evaluation.json").write_text("earlier")

    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(evaluation, "_paired_figures", fail)
    assert main(["evaluate", str(folder / "images.npz"), "--reference", str(folder / "reference.npz")]) == 1
    assert "power cut" in capsys.readouterr().err
    assert (folder / "evaluation.json").read_text() == "earlier"
    assert len(list(folder.iterdir())) == 3


# ---- memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
from moeca_dist.evaluation.evaluate import evaluate
from moeca_dist.evaluation.request import Settings

folder = Path(sys.argv[1])
options = dict(features=str(folder / "inception.pt"), metrics=("psnr", "rel_l2", "inception_score"), resamples=0)
def run(name):
    return evaluate(Settings(folder / f"{name}.npz", folder / f"{name}.npz", **options))
run("small")
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = held + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(run("large").figures["psnr_db"].value)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """180 MB of images, which are read as both sets, are measured with 100 MB more memory than a handful takes."""
    write_script(tmp_path / "inception.pt")
    block_NHWC = np.random.default_rng(0).integers(0, 256, (100, 224, 224, 3), dtype=np.uint8)
    for name, repeats in (("small", 1), ("large", 12)):
        array = np.lib.format.open_memmap(
            tmp_path / "arr_0.npy", mode="w+", dtype=np.uint8, shape=(100 * repeats, 224, 224, 3)
        )
        for start in range(0, 100 * repeats, 100):
            array[start : start + 100] = block_NHWC
        del array
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.write(tmp_path / "arr_0.npy", "arr_0.npy")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(100 * 2**20)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == 200
