"""Pixels from samples: the direct path, the local autoencoder, and what people are told when it is missing."""

import builtins

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeca_dist.errors import UserError
from moeca_dist.sampling.latent_decoder import LATENT_SCALE, LatentDecoder, to_uint8

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The published sd-vae-ft-mse file still names its attention projections this way.
OLD_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
NEEDS_DIFFUSERS = "diffusers (the optional 'vae' extra) is not installed"


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    folder = tmp_path_factory.mktemp("vae")
    autoencoder.save_pretrained(folder)
    return folder


def test_pixels_map_linearly_and_clamp():
    x_BCHW = torch.tensor([-3.0, -1.0, 0.0, 0.2, 1.0, 7.0]).reshape(1, 1, 2, 3)
    expected = torch.tensor([0, 0, 128, 153, 255, 255], dtype=torch.uint8).reshape(1, 2, 3, 1)
    assert torch.equal(to_uint8(x_BCHW), expected)  # 127.5 rounds to the even 128


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256)
    x_BCHW = (levels.float() / 127.5 - 1).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(x_BCHW).flatten().long(), levels)


def test_channels_go_last():
    x_BCHW = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels_BHWC = to_uint8(x_BCHW)
    assert pixels_BHWC.shape == (2, 4, 5, 3) and pixels_BHWC.is_contiguous()
    for channel in range(3):
        assert torch.equal(pixels_BHWC[..., channel : channel + 1], to_uint8(x_BCHW[:, channel : channel + 1]))


def test_no_images_give_no_pixels():
    assert to_uint8(torch.empty(0, 1, 16, 16)).shape == (0, 16, 16, 1)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_latents_are_unscaled_and_decoded_in_chunks(autoencoder_folder, chunk_size):
    from diffusers import AutoencoderKL

    latents_BCHW = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder).eval()
    with torch.no_grad():
        expected_BCHW = autoencoder.decode(latents_BCHW / LATENT_SCALE).sample
    pixels_BHWC = LatentDecoder(autoencoder_folder, chunk_size=chunk_size).decode(latents_BCHW)
    assert pixels_BHWC.shape == (5, 16, 16, 3) and pixels_BHWC.dtype == torch.uint8
    difference = pixels_BHWC.int() - to_uint8(expected_BCHW).int()
    assert difference.abs().max() <= 1  # one level: convolutions of another batch size may round differently


def test_no_latents_decode_to_no_pixels(autoencoder_folder):
    assert LatentDecoder(autoencoder_folder).decode(torch.empty(0, 4, 8, 8)).shape == (0, 16, 16, 3)


def test_wrong_latent_channels_are_refused(autoencoder_folder):
    with pytest.raises(UserError, match="4-channel latents, the samples have 1"):
        LatentDecoder(autoencoder_folder).decode(torch.zeros(1, 1, 8, 8))


def test_chunk_size_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="chunk_size 0"):
        LatentDecoder(tmp_path, chunk_size=0)


def test_missing_diffusers_says_how_to_get_pixels(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_diffusers(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(UserError, match=r"diffusers.*moeca_dist\[vae\].*sd-vae-ft-mse"):
        LatentDecoder(tmp_path)


@pytest.mark.parametrize("content", [None, "not json", '{"_class_name": "AutoencoderKL"}'])
def test_folder_without_an_autoencoder_is_refused(tmp_path, content):
    pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="sd-vae-ft-mse") as caught:
        LatentDecoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(autoencoder_folder, tmp_path):
    for file in autoencoder_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1 << 10])
    (tmp_path / "config.json").write_bytes((autoencoder_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot load the autoencoder"):
        LatentDecoder(tmp_path)


def _copy_with_weights(source, target, rename):
    """Copy the autoencoder with its weights renamed by ``rename``, which drops those it maps to None."""
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = {rename(name): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in weights.items() if name}, target / WEIGHTS)


def test_the_published_attention_names_load(autoencoder_folder, tmp_path):
    def old_name(name):
        for new, old in OLD_ATTENTION_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    _copy_with_weights(autoencoder_folder, tmp_path, old_name)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(tmp_path / WEIGHTS)
    latents_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pixels = [LatentDecoder(folder).decode(latents_BCHW) for folder in (autoencoder_folder, tmp_path)]
    assert torch.equal(*pixels)


def test_missing_weights_are_refused(autoencoder_folder, tmp_path):
    _copy_with_weights(autoencoder_folder, tmp_path, lambda name: None if name == "decoder.conv_out.weight" else name)
    with pytest.raises(UserError, match=r"lacks weights such as 'decoder.conv_out.weight'"):
        LatentDecoder(tmp_path)
