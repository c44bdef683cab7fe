"""The demo's data and its independent judge: real digits, cleanly drawn, never mixed between the two parts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist.demo.data import IMAGE_SIZE, NUM_CLASSES, augment, load_split, render, to_uint8
from moeca_dist.demo.judge import Judge

TRAINING, HELD_OUT = load_split()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.train()


def test_split_is_disjoint_complete_and_fixed_by_its_seed() -> None:
    assert (len(TRAINING), len(HELD_OUT)) == (1500, 297)
    assert sorted(torch.cat([TRAINING.ids_N, HELD_OUT.ids_N]).tolist()) == list(range(1797))
    assert torch.equal(load_split(0)[0].ids_N, TRAINING.ids_N)
    assert not torch.equal(load_split(1)[0].ids_N, TRAINING.ids_N)
    assert set(HELD_OUT.labels_N.tolist()) == set(range(NUM_CLASSES))


def test_render_has_the_stated_shape_and_range() -> None:
    x_NCHW = render(HELD_OUT.ink_NHW)
    assert x_NCHW.shape == (297, 1, IMAGE_SIZE, IMAGE_SIZE) and x_NCHW.dtype == torch.float32
    assert -1 <= x_NCHW.min() < -0.99 and 0.99 < x_NCHW.max() <= 1


def test_render_keeps_the_ink_where_it_was() -> None:
    cells_NHW = F.avg_pool2d(render(HELD_OUT.ink_NHW), 2)[:, 0] / 2 + 0.5
    assert (cells_NHW - HELD_OUT.ink_NHW).abs().mean() < 0.05


def test_render_of_a_blank_and_of_a_full_image() -> None:
    # A full image fades at its border, where it meets the blank surroundings.
    assert torch.equal(render(torch.zeros(1, 8, 8)), torch.full((1, 1, 16, 16), -1.0))
    assert torch.allclose(render(torch.ones(1, 8, 8))[..., 4:-4, 4:-4], torch.ones(1, 1, 8, 8), atol=1e-6)


def test_render_moves_with_its_affine_map() -> None:
    # One source pixel to the right in the source is two output pixels to the left in the image.
    right = torch.tensor([[[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]])
    moved, still = render(HELD_OUT.ink_NHW[:1], right), render(HELD_OUT.ink_NHW[:1])
    assert torch.allclose(moved[..., 2:-4], still[..., 4:-2], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_images=st.integers(1, 5))
def test_augment_keeps_the_range_and_follows_its_generator(seed: int, num_images: int) -> None:
    ink_NHW = TRAINING.ink_NHW[:num_images]
    first, again = (augment(ink_NHW, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (num_images, 1, 16, 16) and first.min() >= -1 and first.max() <= 1
    assert not torch.equal(first, render(ink_NHW))


def test_augment_moves_every_image_its_own_way() -> None:
    drawn = augment(TRAINING.ink_NHW[:1].expand(3, 8, 8), torch.Generator().manual_seed(0))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_to_uint8_clips_and_puts_channels_last() -> None:
    x_NCHW = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(5, 1, 1, 1)
    images = to_uint8(x_NCHW)
    assert images.shape == (5, 1, 1, 1) and images.flatten().tolist() == [0, 0, 128, 255, 255]


def test_judge_reads_held_out_digits(judge: Judge) -> None:
    assert judge.held_out_accuracy >= 0.97
    assert judge.accuracy(to_uint8(render(HELD_OUT.ink_NHW)), HELD_OUT.labels_N) >= 0.97


def test_judge_still_reads_augmented_digits(judge: Judge) -> None:
    # Otherwise a perfect generator of the training images would be marked down for the augmentation.
    images = to_uint8(augment(HELD_OUT.ink_NHW, torch.Generator().manual_seed(0)))
    assert judge.accuracy(images, HELD_OUT.labels_N) >= 0.96


def test_judge_is_deterministic_and_not_fooled(judge: Judge) -> None:
    images = to_uint8(render(HELD_OUT.ink_NHW))
    assert np.array_equal(judge.read(images), Judge.train().read(images.numpy()))
    wrong_labels_N = (HELD_OUT.labels_N + 1) % NUM_CLASSES
    assert judge.accuracy(images, wrong_labels_N) < 0.03
    noise = torch.randint(0, 256, (200, 16, 16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert judge.accuracy(noise, torch.arange(200) % NUM_CLASSES) < 0.3


@pytest.mark.parametrize("images", [torch.zeros(2, 16, 16, 1), torch.zeros(2, 1, 16, 16, dtype=torch.uint8)])
def test_judge_refuses_other_layouts(judge: Judge, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        judge.read(images)
