"""The shipped network: small, loaded like any published checkpoint, and its digits can be read."""

from moeca_dist.checkpoints.load import load_model
from moeca_dist.demo.data import NUM_CLASSES
from moeca_dist.demo.model_card import SHIPPED_CHECKPOINT, generate, legibility, variety
from moeca_dist.demo.train import DEMO_SPEC


def test_shipped_file_is_small_and_states_what_it_is() -> None:
    assert SHIPPED_CHECKPOINT.stat().st_size <= 12_000_000
    assert load_model(SHIPPED_CHECKPOINT).spec == DEMO_SPEC


def test_five_hundred_digits_are_legible_and_varied_and_the_experts_share_the_work() -> None:
    labels_N = [index % NUM_CLASSES for index in range(500)]
    images_NHWC, watcher = generate(load_model(SHIPPED_CHECKPOINT), labels_N, num_steps=50, cfg_scale=1.5, seed=0)
    assert legibility(images_NHWC, labels_N)["judge_on_generated"] >= 0.97
    figures = variety(images_NHWC, labels_N, seed=0)
    assert figures["nearest_training_generated"] > figures["nearest_training_copies"]
    assert figures["spread_within_class_generated"] > 0.8 * figures["spread_within_class_real"]
    routing = watcher.summary()
    assert max(routing["max_over_mean_load"]) < 1.5
    assert max(routing["new_branches_per_step"]) < 0.1
