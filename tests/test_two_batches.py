"""``parallel.two_batch_overlap``: turns in the right order, and to rounding the images of one block after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.checks import check_config
from moeca_dist.config import Config
from moeca_dist.kernels.row_codes import FORMATS
from moeca_dist.models.two_batches import in_turns
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.references import Places, RowCoding
from moeca_dist.timing import UNTIMED
from tests.golden_files import load_golden
from tests.test_placement_images import difference

CACHES: list[dict[str, Any]] = [
    {"policy": "none"},
    # Steps with both guidance halves in full, with one, and with none.
    {"policy": "network_forecast", "full_steps": {"conditional": [0, 1, 4], "unconditional": [0, 3]}},
    {"policy": "teacache", "delta": 0.008},
]


def make_config(
    folder: Path, network: str, overlap: bool, cache: dict[str, Any] = CACHES[0], **parallel: Any
) -> Config:
    golden = load_golden(network)
    path = folder / f"{network}.safetensors"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "parallel": {"two_batch_overlap": overlap, **parallel},
            "cache": cache,
            "sampling": {"num_steps": 6, "batch_size": 2},
        }
    )


def generate(config: Config, count: int) -> tuple[NDArray[np.generic], Report]:
    mesh = Mesh.create(LauncherEnv.read(), ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    return engine.generate([Request(index, index % 10, seed=3) for index in range(count)])


def both(before: Config, after: Config, count: int) -> tuple[Any, Any]:
    """Without overlap and with it, one after the other on the same ranks."""
    return generate(before, count), generate(after, count)


class Recorded(nn.Module):
    """A block that adds 1, and notes which half is where."""

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self.name, self.events = name, events

    def start(self, x_BTD: Tensor, c_BD: Tensor, *_: Any) -> Pending[Pending[Tensor]]:
        half = f"{self.name}{int(c_BD[0, 0])}"
        self.events.append(f"{half} starts")

        def computed() -> Pending[Tensor]:
            self.events.append(f"{half} computes")
            return Pending(summed)

        def summed() -> Tensor:
            self.events.append(f"{half} returns")
            return x_BTD + 1

        return Pending(computed)


def test_each_leg_has_the_other_half_beside_it() -> None:
    events: list[str] = []
    x_BTD, c_BD = torch.arange(4.0).view(4, 1, 1), torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    blocks: Any = [Recorded("a", events), Recorded("b", events)]
    out_BTD = in_turns(blocks, x_BTD, c_BD, None, UNTIMED, None)
    assert torch.equal(out_BTD, x_BTD + 2)
    assert events == [
        *("a0 starts", "a1 starts", "a0 computes", "a1 computes"),
        *("a0 returns", "b0 starts", "a1 returns", "b1 starts", "b0 computes", "b1 computes"),
        *("b0 returns", "b1 returns"),
    ]


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["policy"])
@pytest.mark.parametrize(("network", "count"), [("dsmoe_e12", 5), ("dit_moe_qkv", 3), ("dsmoe_e12", 1)])
def test_images_are_the_same_to_rounding(
    two_ranks: Any, network: str, count: int, cache: dict[str, Any], tmp_path: Path
) -> None:
    """Five images: rounds of two on each rank, then one and none. One image: a rank has none at all."""
    configs = [make_config(tmp_path, network, overlap, cache) for overlap in (False, True)]
    (expected, before), (images, after) = two_ranks.run(both, *configs, count)[0]
    assert difference(images, expected) <= 1e-5
    assert after.exchange.bytes_sent == before.exchange.bytes_sent > 0
    assert (after.flops, after.branches) == (before.flops, before.branches)
    assert after.exchange.agreements == 2 * before.exchange.agreements


def test_groups_beside_each_other(four_ranks: Any, tmp_path: Path) -> None:
    configs = [make_config(tmp_path, "dsmoe_e12", overlap, CACHES[1], ep_size=2) for overlap in (False, True)]
    (expected, _), (images, _) = four_ranks.run(both, *configs, 5)[0]
    assert difference(images, expected) <= 1e-5


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["policy"])
def test_coded_rows_have_the_same_references(two_ranks: Any, cache: dict[str, Any], tmp_path: Path) -> None:
    """A code can fall the other way where rounding does: samples differ by what one code is worth."""
    configs = [make_config(tmp_path, "dsmoe_e12", overlap, cache, rows="int8") for overlap in (False, True)]
    (expected, before), (images, after) = two_ranks.run(both, *configs, 5)[0]
    assert difference(images, expected) <= 2e-4
    assert after.exchange.bytes_sent == before.exchange.bytes_sent
    assert after.exchange.reference_bytes == before.exchange.reference_bytes > 0


@pytest.mark.parametrize("of_batch", [slice(None), slice(2, 6), torch.tensor([5, 1, 2])], ids=["all", "half", "some"])
@pytest.mark.parametrize("of_these", [slice(None), slice(0, 2), slice(2, 3)], ids=["all", "first", "last"])
def test_halves_of_some_images_keep_their_slots(of_batch: slice | torch.Tensor, of_these: slice) -> None:
    coding = RowCoding(Places.of(FORMATS["int8"], 0, [6, 6], 3, torch.device("cpu")))
    slot_T = coding.of_images(of_batch).of_images(of_these).slot_T
    slot_T = torch.arange(18) if slot_T is None else slot_T
    expected_T = torch.arange(18).view(6, 3)[of_batch][of_these].flatten()
    assert torch.equal(slot_T, expected_T)


def test_one_rank_is_left_as_it_is(tmp_path: Path) -> None:
    before, after = (generate(make_config(tmp_path, "dsmoe_e12", overlap), 3)[0] for overlap in (False, True))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("policy", ["taylorseer", "moeca", "moeca_forecast", "fora", "toca"])
def test_what_would_have_no_effect_is_refused(policy: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, "dsmoe_e12", True, {"policy": policy})
    with pytest.raises(UserError, match=f"parallel.two_batch_overlap has no effect with cache.policy {policy}"):
        check_config(config, [0])
