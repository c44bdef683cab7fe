"""The demo's training: interruptions change nothing, loads are balanced, exports load like published files."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moeca_dist.checkpoints.load import load_model
from moeca_dist.demo.balance import LoadBalancer
from moeca_dist.demo.data import load_split
from moeca_dist.demo.train import DEMO_SPEC, OutputPaths, TrainConfig, Trainer, flow_loss, main, train
from moeca_dist.errors import UserError

CONFIG = TrainConfig(steps=4, batch_size=2, warmup_steps=1, log_every=2, save_every=2)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10)
    factors = [config.schedule(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, abs=1e-3)
    assert max(factors) == pytest.approx(1, abs=0.03) and factors.index(max(factors)) == 9
    assert factors[100] == pytest.approx(0, abs=1e-9) and all(a >= b for a, b in pairwise(factors[9:]))


def test_untrained_network_is_silent_and_its_loss_is_the_velocity_itself() -> None:
    trainer = Trainer(CONFIG)
    x_BCHW = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        trainer.model(x_BCHW, torch.tensor([0.1, 0.9]), torch.tensor([3, 10])), torch.zeros(2, 1, 16, 16)
    )
    loss = flow_loss(trainer.model, load_split()[0], replace(CONFIG, batch_size=64), torch.Generator().manual_seed(0))
    assert 1.5 < loss.item() < 1.9  # noise of variance 1, and pixels that are mostly -1 or near 1


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    whole, interrupted, resumed = Trainer(CONFIG), Trainer(CONFIG), Trainer(CONFIG)
    for _ in range(3):
        whole.train_step()
    for _ in range(2):
        interrupted.train_step()
    interrupted.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    resumed.train_step()
    for ours, theirs in ((resumed.model, whole.model), (resumed.ema, whole.ema)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_train_writes_a_checkpoint_that_the_common_loader_reads(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path / "new" / "tiny.safetensors")
    train(CONFIG, paths.checkpoint)
    model = load_model(paths.checkpoint)
    assert model.spec == DEMO_SPEC
    assert paths.history.is_file() and paths.plot.is_file()
    averaged = Trainer(CONFIG)
    averaged.load(paths.state)
    assert averaged.step == 4
    assert all(torch.equal(value, averaged.ema.state_dict()[name]) for name, value in model.state_dict().items())


def test_balancer_lowers_the_bias_of_busy_experts_only() -> None:
    trainer = Trainer(CONFIG)
    gate = trainer.model.blocks[1].feed_forward.gate
    with torch.no_grad():
        gate.weight.zero_()  # all scores equal, so the bias alone chooses experts 2 and 5
        gate.e_score_correction_bias[[2, 5]] = 1.0
    balancer = LoadBalancer(trainer.model)
    trainer.model(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert balancer.step(0.25) >= 4.0
    expected = torch.full((8,), 0.25)
    expected[[2, 5]] = 0.75
    assert torch.equal(gate.e_score_correction_bias, expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "at least 1"),
        (["--resume"], "nothing to resume"),
        (["--batch-size", "-3"], "-3"),
        (["--threads", "0"], "1 or more"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "x.safetensors"), "--threads", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        train(CONFIG, tmp_path / "file" / "tiny.safetensors")


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    Trainer(CONFIG).save(tmp_path / "state.pt")
    with pytest.raises(UserError, match="other settings"):
        Trainer(replace(CONFIG, seed=1)).load(tmp_path / "state.pt")
