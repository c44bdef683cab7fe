"""What torch-fidelity and lpips are asked for; they, and the torchvision they import, are installed on demand.

Shape suffixes: N images, C channels, H and W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moeca_dist import UserError
from moeca_dist.evaluation.evaluate import evaluate
from moeca_dist.evaluation.inception import load_inception, tensorflow_resize
from moeca_dist.evaluation.lpips import SMALLEST_SIDE, Perceptual
from moeca_dist.evaluation.request import Settings

try:
    import lpips
    import torch_fidelity.feature_extractor_inceptionv3 as torch_fidelity_inception
    import torchvision
except (ImportError, RuntimeError) as reason:
    # RuntimeError: a torchvision that was built for another torch.
    pytest.skip(f"the evaluation extra is not installed: {reason}", allow_module_level=True)


def images(count: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


# ---- the Inception network from its weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """torch-fidelity's network with random weights, and a file of them; activations neither vanish nor explode."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch_fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        found = torch_fidelity_inception.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    for module in found.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(found.state_dict(), path)
    return found, path


def test_weights_give_what_torch_fidelity_gives(network: tuple[Any, Path]) -> None:
    theirs, path = network
    images_NHWC = images(3, 40)
    found = load_inception(str(path), "cpu").features(images_NHWC)
    with torch.inference_mode():
        pooled, logits = theirs(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2))
    assert np.allclose(found["pooled"], pooled, rtol=1e-4) and pooled.std() > 1e-2
    assert np.allclose(found["probabilities"], logits.softmax(1), rtol=1e-3, atol=1e-7)
    assert found["spatial"].shape == (3, 2023) and found["probabilities"].shape == (3, 1008)


class StyleganLayout(nn.Module):
    """The same network as StyleGAN's script arranges it, with its own resize."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        names = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        names += ("MaxPool_2", *(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")))
        for name in (*names, "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"):
            self.layers.add_module(name.replace("Mixed_6d", "mixed_6"), getattr(network, name))
        self.layers.mixed_6 = Renamed(network.Mixed_6d)
        self.output = network.fc

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = nn.functional.interpolate(img.float(), (299, 299), mode="nearest")
        return self.layers((x - 128) / 128).reshape(-1, 2048)


class Renamed(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.conv = block.branch1x1

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_both_layouts_of_the_same_weights_agree(network: tuple[Any, Path], tmp_path: Path) -> None:
    """Spatial map and logits too. At 299 pixels, where the layouts' own resizes have nothing to do."""
    theirs, path = network
    images_NHWC = images(2, 299)
    script = tmp_path / "inception.pt"
    layout = torch.jit.script(StyleganLayout(theirs).eval())
    layout.save(str(script))
    with pytest.MonkeyPatch.context() as patch:
        # The self-check asks at a size at which this layout resizes in another way.
        patch.setattr("moeca_dist.evaluation.inception._SELF_CHECK_TOLERANCE", 10.0)
        found = load_inception(str(script), "cpu").features(images_NHWC)
    for name, values in load_inception(str(path), "cpu").features(images_NHWC).items():
        assert np.allclose(found[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max()), name


@pytest.mark.parametrize("side", [16, 256, 299, 512])
def test_the_resize_is_that_of_torch_fidelity(side: int) -> None:
    images_NCHW = torch.from_numpy(images(1, side)).permute(0, 3, 1, 2).float()
    theirs = torch_fidelity_inception.interpolate_bilinear_2d_like_tensorflow1x(
        images_NCHW, size=(299, 299), align_corners=False
    )
    assert torch.allclose(tensorflow_resize(images_NCHW), theirs, atol=0.02)


def test_other_weights_are_refused(network: tuple[Any, Path], tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not the Inception network"):
        load_inception(str(tmp_path / "other.pth"), "cpu")


# ---- LPIPS -----------------------------------------------------------------------------------------------------------

BUILDERS = {
    "alex": lambda: torchvision.models.alexnet(weights=None).features,
    "vgg": lambda: torchvision.models.vgg16(weights=None).features,
    "squeeze": lambda: torchvision.models.squeezenet1_1(weights=None).features,
}
# The layers that LPIPS compares, as torchvision numbers them (Zhang et al. 2018, appendix B).
COMPARED = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}


def write_weights(folder: Path, net: str) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    features = BUILDERS[net]().eval()
    path = folder / f"{net}.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path, features


@pytest.mark.parametrize("net", sorted(BUILDERS))
def test_lpips_is_that_of_the_paper(tmp_path: Path, net: str) -> None:
    """Equation 1: squared differences of unit-normalised features, weighted per channel, averaged over positions."""
    path, layers = write_weights(tmp_path, net)
    weights = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    calibration = torch.load(weights, map_location="cpu", weights_only=True)
    x, y = (torch.from_numpy(images(2, 64, seed=seed)).permute(0, 3, 1, 2).double() / 255 for seed in (0, 1))
    y[1] = x[1]
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    expected = torch.zeros(2)
    features = [((image * 2 - 1).float() - shift) / scale for image in (x, y)]
    with torch.inference_mode():
        for index, layer in enumerate(layers):
            features = [layer(feature) for feature in features]
            if index in COMPARED[net]:
                weight = calibration[f"lin{COMPARED[net].index(index)}.model.1.weight"]
                unit = [feature / (feature.norm(dim=1, keepdim=True) + 1e-10) for feature in features]
                expected += ((unit[0] - unit[1]) ** 2 * weight).sum(1).mean((1, 2))
    found = Perceptual(str(path), "cpu").distance(x, y)
    assert expected[0] > 1e-4 and found[1] == 0
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-3)


@pytest.mark.parametrize("net", sorted(BUILDERS))
def test_the_smallest_side_is_the_smallest(tmp_path: Path, net: str) -> None:
    path, _ = write_weights(tmp_path, net)
    perceptual, side = Perceptual(str(path), "cpu"), SMALLEST_SIDE[net]
    perceptual.check_size((side, side + 5, 3))
    x = torch.rand(1, 1, side, side)
    assert perceptual.distance(x, x) == 0
    with pytest.raises(RuntimeError):
        perceptual.distance(x[..., 1:, 1:], x[..., 1:, 1:])
    with pytest.raises(UserError, match=f"LPIPS with {net} needs sides of {side} pixels, these images have {side - 1}"):
        perceptual.check_size((side - 1, side + 5, 3))


def test_lpips_is_a_figure_of_the_evaluation(tmp_path: Path) -> None:
    path, _ = write_weights(tmp_path, "squeeze")
    np.savez(tmp_path / "a.npz", images(3, 32))
    np.savez(tmp_path / "b.npz", images(3, 32, seed=1))
    figure = evaluate(Settings(tmp_path / "a.npz", tmp_path / "b.npz", lpips=str(path), resamples=20)).figures["lpips"]
    assert figure.interval is not None and 0 < figure.interval.low <= figure.value <= figure.interval.high


def test_other_files_are_no_weights_for_lpips(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(UserError, match="is no file of weights"):
        Perceptual(str(tmp_path / "text"), "cpu")
    torch.save(torchvision.models.vgg11(weights=None).state_dict(), tmp_path / "vgg11.pth")
    with pytest.raises(UserError, match="neither alexnet nor vgg16 nor squeezenet1_1"):
        Perceptual(str(tmp_path / "vgg11.pth"), "cpu")
