"""Feature networks: the field's Inception layouts, and the demo's own.

Shape suffixes: N images, C channels, H and W pixels.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moeca_dist import UserError
from moeca_dist.demo.data import load_split, real_digits, render, to_uint8
from moeca_dist.demo.judge import DigitNetwork
from moeca_dist.evaluation.features import open_network
from moeca_dist.evaluation.inception import load_inception, tensorflow_resize
from tests.helpers.inception_files import NUM_CLASSES, Small, write_script

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def photographs(count: int, height: int = 20, width: int = 33, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def test_the_script_layout_gives_what_the_script_gives_and_its_spatial_map(tmp_path: Path) -> None:
    path = write_script(tmp_path / "inception.pt")
    script = torch.jit.load(str(path))
    network = load_inception(str(path), "cpu")
    images_NHWC = photographs(5)
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    found = network.features(images_NHWC)
    assert {name: values.shape for name, values in found.items()} == {
        "pooled": (5, 2048),
        "spatial": (5, 2023),
        "probabilities": (5, NUM_CLASSES),
    }
    assert {name: values.shape[1] for name, values in found.items()} == network.widths | {"spatial": 2023}
    with torch.inference_mode():
        assert np.allclose(found["pooled"], script(images_NCHW, return_features=True), atol=1e-5)
        assert np.allclose(found["probabilities"], script(images_NCHW, no_output_bias=True), atol=1e-6)
        assert not np.allclose(found["probabilities"], script(images_NCHW), atol=1e-3)
        x = script.layers.conv((tensorflow_resize(images_NCHW.float()) - 128) / 128)
        first_channels = script.layers.mixed_6(x)[:, :7]
    assert np.allclose(found["spatial"].reshape(5, 17, 17, 7), first_channels.permute(0, 2, 3, 1), atol=1e-5)


def test_grey_images_are_read_as_grey_rgb(tmp_path: Path) -> None:
    network = load_inception(str(write_script(tmp_path / "inception.pt")), "cpu")
    grey_NHWC = photographs(3, channels=1)
    for name, values in network.features(grey_NHWC.repeat(3, axis=3)).items():
        assert np.array_equal(network.features(grey_NHWC)[name], values), name


def test_the_resize_is_tensorflows() -> None:
    """TensorFlow 1: output pixel i reads at i x (size / 299), bilinear, clamped at the border."""
    images_NCHW = torch.rand(1, 3, 7, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    found = tensorflow_resize(images_NCHW)

    def corners(size: int, position: int) -> tuple[int, int, float]:
        at = position * size / 299
        return int(at), min(int(at) + 1, size - 1), at - int(at)

    for row, column in ((0, 0), (298, 298), (150, 3), (297, 260), (33, 299 - 1)):
        top, bottom, down = corners(7, row)
        left, right, along = corners(400, column)
        image = images_NCHW[0]
        upper = image[:, top, left] * (1 - along) + image[:, top, right] * along
        lower = image[:, bottom, left] * (1 - along) + image[:, bottom, right] * along
        assert torch.allclose(found[0, :, row, column], upper * (1 - down) + lower * down, atol=1e-3)


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_inception(str(path), "cpu")
        return str(caught.value)

    assert "does not exist: give a local Inception file" in refusal(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no network")
    assert "is neither the TorchScript file inception-2015-12-05.pt nor the weights" in refusal(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    assert "is neither the TorchScript file" in refusal(tmp_path / "weights.pth")
    assert "but not the Inception network" in refusal(write_script(tmp_path / "linear.pt", nn.Linear(3, 3)))
    bare = Small()
    del bare.layers.mixed_6
    bare.layers.mixed_7 = nn.Conv2d(8, 2048, 1)
    assert "has no layer mixed_6" in refusal(write_script(tmp_path / "bare.pt", bare))
    flipped = refusal(write_script(tmp_path / "flipped.pt", Small(flipped=True)))
    assert "layers in a row give other features" in flipped


def test_the_digit_network_reads_digits_and_knows_how_sure_it_is() -> None:
    _, held_out = load_split()
    images_NHWC = to_uint8(render(held_out.ink_NHW)).numpy()
    network = DigitNetwork.train()
    found = network.features(images_NHWC)
    assert {name: values.shape[1] for name, values in found.items()} == network.widths
    probabilities_NK = found["probabilities"]
    accuracy = (probabilities_NK.argmax(1) == held_out.labels_N.numpy()).mean()
    assert accuracy > 0.95
    assert probabilities_NK.max(1).mean() == pytest.approx(accuracy, abs=0.02)
    assert np.array_equal(DigitNetwork.train().features(images_NHWC)["probabilities"], probabilities_NK)


def test_the_digit_network_reads_nothing_else() -> None:
    assert open_network("digits", "cpu", real_digits().shape[1:]).widths["pooled"] == 64
    with pytest.raises(UserError, match="reads images of 16 x 16 x 1, not 32 x 32 x 3: give an Inception file"):
        open_network("digits", "cpu", (32, 32, 3))


@pytest.mark.gpu
def test_features_of_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = str(write_script(tmp_path / "inception.pt"))
    images_NHWC = photographs(5)
    expected = load_inception(path, "cpu").features(images_NHWC)
    for name, values in load_inception(path, "cuda").features(images_NHWC).items():
        # Convolutions may run in TF32 there.
        assert np.linalg.norm(values - expected[name]) <= 5e-3 * np.linalg.norm(expected[name]), name
