"""Noise belongs to the image: to (seed, index) alone, never to its batch, its rank or its place in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist.errors import UserError
from moeca_dist.sampling.noise import NoiseSource, image_generator
from moeca_dist.types import Request

SHAPE = (2, 3, 5)
RECORDED = [0.545865, -0.358755, -0.717865, 0.771318]  # seed 0, index 0, shape (1, 2, 2)
PAIRS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


def _requests(pairs):
    return [Request(index=index, label=0, seed=seed) for seed, index in pairs]


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(PAIRS, max_size=6), position=st.integers(0, 5), draws=st.integers(1, 3))
def test_a_draw_is_the_same_in_any_company(pairs, position, draws):
    if not pairs:
        return
    position %= len(pairs)
    alone, together = NoiseSource(_requests(pairs[position : position + 1])), NoiseSource(_requests(pairs))
    for _ in range(draws):
        assert torch.equal(alone.draw(SHAPE)[0], together.draw(SHAPE)[position])


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(PAIRS, min_size=1, max_size=6, unique=True), data=st.data())
def test_splitting_the_batch_over_ranks_changes_nothing(pairs, data):
    cut = data.draw(st.integers(0, len(pairs)))
    whole = NoiseSource(_requests(pairs)).draw(SHAPE)
    parts = [NoiseSource(_requests(part)).draw(SHAPE) for part in (pairs[:cut], pairs[cut:])]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(pairs)


def test_labels_do_not_enter():
    requests = [Request(index=4, label=label, seed=9) for label in (0, 7)]
    first, second = NoiseSource(requests).draw(SHAPE)
    assert torch.equal(first, second)


def test_seed_and_index_do_not_trade_places():
    assert image_generator(1, 2).initial_seed() != image_generator(2, 1).initial_seed()
    assert len({image_generator(seed, index).initial_seed() for seed in range(20) for index in range(20)}) == 400


def test_the_stream_is_the_documented_one():
    state = int(np.random.SeedSequence([3, 11]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state)
    source = NoiseSource(_requests([(3, 11)]))
    for _ in range(2):  # the second draw continues the stream
        assert torch.equal(source.draw(SHAPE)[0], torch.randn(SHAPE, generator=generator))


def test_the_stream_stays_the_same_between_versions():
    """Recorded figures: images must not change with an upgrade without anyone noticing."""
    drawn = NoiseSource(_requests([(0, 0)])).draw((1, 2, 2)).flatten()
    torch.testing.assert_close(drawn, torch.tensor(RECORDED), atol=1e-6, rtol=0)


def test_no_images_draw_nothing():
    drawn = NoiseSource([]).draw(SHAPE)
    assert drawn.shape == (0, *SHAPE) and drawn.dtype == torch.float32


def test_draws_are_standard_normal():
    drawn = NoiseSource(_requests([(0, index) for index in range(64)])).draw((4, 16, 16))
    assert abs(drawn.mean().item()) < 0.02 and abs(drawn.std().item() - 1) < 0.02


@pytest.mark.parametrize(("seed", "index", "named"), [(-1, 0, "seed -1"), (2**32, 0, "seed"), (0, -2, "index -2")])
def test_numbers_without_a_stream_of_their_own_are_refused(seed, index, named):
    with pytest.raises(UserError, match=named):
        image_generator(seed, index)
