"""Manifest, files and ledger of a batch: what is recorded is there, and what is damaged is noticed."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeca_dist import Request, UserError
from moeca_dist.cli import main
from moeca_dist.config import Config
from moeca_dist.ray_batch import manifest as manifest_module
from moeca_dist.ray_batch.assembly import History
from moeca_dist.ray_batch.identity import batch_identity, check_same, checkpoint_digest
from moeca_dist.ray_batch.jobs import LabelCycle
from moeca_dist.ray_batch.ledger import Ledger, Plan
from moeca_dist.ray_batch.manifest import MANIFEST, Manifest, read_identity, read_records
from moeca_dist.ray_batch.store import PENDING, Store, decode, encode, encode_all
from moeca_dist.ray_batch.supervisor import Chunk, Supervisor

PICTURES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
REPORT = {"num_images": 4}


def plan(folder: Path, num_images: int = 10) -> Plan:
    source = LabelCycle(num_images, [range(10)], 0)
    return Plan(folder, source, num_images, 4, 3, {"requests": source.identity()})


def contents(requests: Any) -> dict[str, bytes]:
    indices = [request.index for request in requests]
    return encode_all(indices, PICTURES[indices])


def begun(folder: Path, num_images: int = 10) -> Supervisor:
    supervisor = Supervisor(plan(folder, num_images))
    supervisor.begin(gangs=1)
    return supervisor


def released(supervisor: Supervisor) -> None:
    """What the end of its process does."""
    supervisor._ledger.manifest.close()


# ---- manifest --------------------------------------------------------------------------------------------------------


def test_records_come_back_in_order(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, 0)
    manifest.append("job", version=1, identity={"a": [1.5, "x", None]})
    manifest.append("run", gangs=2)
    records = list(read_records(tmp_path / MANIFEST))
    assert [record["kind"] for record in records] == ["job", "run"]
    assert records[0]["identity"] == {"a": [1.5, "x", None]}
    assert all(json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines())


@pytest.mark.parametrize(
    "tail", [b'{"kind":"chu', b"\n", b"\x00\x00\x00", b'{"kind":"run","crc":1}\n', b"[]\n", b"3\n"]
)
def test_a_damaged_tail_is_cut_off_and_said_so(tmp_path: Path, tail: bytes) -> None:
    manifest = Manifest(tmp_path, 0)
    manifest.append("job", version=1)
    manifest.append("run")
    manifest.close()
    path = tmp_path / MANIFEST
    good = path.read_bytes()
    path.write_bytes(good + tail)
    assert len(list(read_records(path))) == 2
    manifest = Manifest(tmp_path, 0)
    assert manifest.repair is not None and "line 3 is damaged; going on from the 2 good records" in manifest.repair
    assert path.read_bytes() == good
    manifest.append("run")
    assert len(list(read_records(path))) == 3


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, 0)
    manifest.append("chunk", chunk=1, files=["images/000001.png"], sha256=["ab"])
    manifest.close()
    path = tmp_path / MANIFEST
    good = path.read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        found = list(read_records(path))
        assert found == [] or found == list(_records_of(good, tmp_path)), place


def _records_of(content: bytes, folder: Path) -> list[dict[str, Any]]:
    path = folder / "other"
    path.write_bytes(content)
    return list(read_records(path))


def test_only_one_run_writes(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, 0)
    with pytest.raises(UserError, match="another run is writing"):
        Manifest(tmp_path, 0.3)
    manifest.close()
    Manifest(tmp_path, 0).close()


def test_a_record_that_does_not_fit_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(tmp_path, 0)
    manifest.append("job", version=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            manifest.append("run")
    assert len((tmp_path / MANIFEST).read_bytes().splitlines()) == 1
    manifest.append("run")
    assert len(list(read_records(tmp_path / MANIFEST))) == 2


def test_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    assert read_identity(tmp_path) is None
    Manifest(tmp_path, 0).append("job", version=99)
    with pytest.raises(UserError, match="no manifest of this version"):
        read_identity(tmp_path)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3)])
def test_pictures_and_latents_come_back(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    latent = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)
    assert np.array_equal(decode(encode(picture)), picture)
    assert np.array_equal(decode(encode(latent)), latent) and decode(encode(latent)).dtype == np.float32


def test_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    written = []

    def full_after_two(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("moeca_dist.ray_batch.store.write_durably", full_after_two)
    with pytest.raises(OSError, match="No space"):
        store.write(contents([Request(index, 0) for index in range(4)]))
    assert not list(tmp_path.rglob("*"))


def test_opening_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / "000000.png").write_bytes(b"half")
    Store(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- supervisor ------------------------------------------------------------------------------------------------------


def serve(supervisor: Supervisor) -> list[Chunk]:
    """Complete everything that is left."""
    served = []
    while (chunk := supervisor.lease(frozenset())) is not None:
        assert supervisor.commit(chunk.id, contents(chunk.requests), 0, REPORT)
        served.append(chunk)
    return served


def test_every_index_is_given_out_once(tmp_path: Path) -> None:
    served = serve(begun(tmp_path))
    assert [request.index for chunk in served for request in chunk.requests] == list(range(10))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{index:06d}.png" for index in range(10)]


def test_a_restarted_supervisor_knows_what_is_recorded(tmp_path: Path) -> None:
    supervisor = begun(tmp_path)
    chunk = supervisor.lease(frozenset())
    assert chunk is not None
    supervisor.commit(chunk.id, contents(chunk.requests), 0, REPORT)
    released(supervisor)
    again = Supervisor(plan(tmp_path))
    assert not again.commit(chunk.id, contents(chunk.requests), 0, REPORT), "a commit that Ray repeats counts once"
    # Chunk 1 is with a gang that outlived the supervisor.
    second = again.lease(frozenset({1}))
    assert second is not None and second.id == 2
    assert again.status().images == 4 and again.status().remaining == 2


def test_a_failed_chunk_comes_last_and_is_given_up_after_three_tries(tmp_path: Path) -> None:
    supervisor = begun(tmp_path)
    first = supervisor.lease(frozenset())
    assert first is not None
    assert not supervisor.fail(first, "boom", True)
    assert not supervisor.fail(first, "node lost", False)
    order = []
    for _ in range(4):
        chunk = supervisor.lease(frozenset())
        assert chunk is not None
        order.append(chunk.id)
    assert order[:2] == [1, 2] and order[2] == 0
    assert not supervisor.fail(first, "boom", True)
    assert supervisor.fail(first, "boom", True)
    status = supervisor.status()
    assert (status.remaining, status.quarantined) == (2, 1)
    released(supervisor)
    # A new run tries it again; a restart within the run does not.
    assert Supervisor(plan(tmp_path)).status().quarantined == 1


def test_a_new_run_forgets_failures(tmp_path: Path) -> None:
    supervisor = begun(tmp_path, num_images=4)
    chunk = supervisor.lease(frozenset())
    assert chunk is not None
    for _ in range(3):
        supervisor.fail(chunk, "boom", True)
    assert supervisor.status().remaining == 0
    released(supervisor)
    supervisor = begun(tmp_path, num_images=4)
    assert supervisor.status().remaining == 1
    serve(supervisor)
    history = History.read(plan(tmp_path, 4))
    assert history.runs == 2 and not history.quarantined and [record["first"] for record in history.chunks()] == [0]


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_damaged_files_are_made_again(tmp_path: Path, damage: str) -> None:
    supervisor = begun(tmp_path)
    serve(supervisor)
    released(supervisor)
    victim = tmp_path / "images" / "000005.png"
    good = victim.read_bytes()
    match damage:
        case "missing":
            victim.unlink()
        case "altered":
            victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        case "truncated":
            victim.write_bytes(good[:10])
    supervisor = begun(tmp_path)
    problems = supervisor.verify()
    assert len(problems) == 1 and "000005.png" in problems[0]
    assert [chunk.id for chunk in serve(supervisor)] == [1]
    assert victim.read_bytes() == good
    released(supervisor)
    assert begun(tmp_path).verify() == []


def test_a_jobs_file_that_changed_is_not_mixed_in(tmp_path: Path) -> None:
    changed = Plan(tmp_path, LabelCycle(10, [range(10)], 1), 10, 4, 3, plan(tmp_path).identity)
    supervisor = Supervisor(changed)
    with pytest.raises(UserError, match="changed while the batch ran"):
        supervisor.lease(frozenset())


def test_a_million_requests_take_a_byte_per_chunk(tmp_path: Path) -> None:
    large = Plan(tmp_path, LabelCycle(1_000_000, [range(10)], 0), 1_000_000, 4, 3, plan(tmp_path).identity)
    assert len(Ledger(large).done) == 250_000


# ---- identity --------------------------------------------------------------------------------------------------------


def test_differences_are_named() -> None:
    before = {"config": {"cache.policy": "fora", "sampling.cfg_scale": 1.5}, "requests": {"seed": 0}, "gang_size": 2}
    check_same(before, json.loads(json.dumps(before)))
    now = {"config": {"cache.policy": "moeca", "sampling.cfg_scale": 1.5}, "requests": {"seed": 3}, "gang_size": 2}
    with pytest.raises(UserError) as error:
        check_same(before, now)
    assert "cache.policy was fora and is now moeca; requests.seed was 0 and is now 3" in str(error.value)


def test_a_folder_is_its_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = checkpoint_digest(tmp_path)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert checkpoint_digest(tmp_path) != first
    assert checkpoint_digest(None) is None


def identity_of(config: Config) -> dict[str, Any]:
    return batch_identity(config, LabelCycle(1, [range(10)], 0), 1, 1, "cpu")


def test_the_identity_has_a_calibration_s_content_and_not_its_place(tmp_path: Path) -> None:
    def with_calibration(name: str, text: str) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        return identity_of(Config.model_validate({"cache": {"policy": "fora", "calibration": str(tmp_path / name)}}))

    first = with_calibration("a.json", "1")
    check_same(first, with_calibration("b.json", "1"))
    with pytest.raises(UserError, match=r"calibration\.sha256 was"):
        check_same(first, with_calibration("a.json", "2"))


def test_the_identity_has_an_expert_placement_s_content(tmp_path: Path) -> None:
    found = []
    for name, text in (("a.json", "1"), ("b.json", "1"), ("b.json", "2")):
        (tmp_path / name).write_text(text)
        found.append(identity_of(Config.model_validate({"parallel": {"expert_placement": str(tmp_path / name)}})))
    check_same(found[0], found[1])
    with pytest.raises(UserError, match=r"expert_placement\.sha256 was"):
        check_same(found[0], found[2])


def test_a_limit_may_change_and_the_storage_may_not() -> None:
    first = identity_of(Config.model_validate({"cache": {"policy": "fora"}}))
    check_same(
        first, identity_of(Config.model_validate({"cache": {"policy": "fora"}, "quality": {"draft": "moved.yaml"}}))
    )
    check_same(first, identity_of(Config.model_validate({"cache": {"policy": "fora", "memory_limit": "2GiB"}})))
    with pytest.raises(UserError, match=r"cache\.dtype was model and is now bfloat16"):
        check_same(first, identity_of(Config.model_validate({"cache": {"policy": "fora", "dtype": "bfloat16"}})))


@pytest.mark.parametrize(("name", "value"), [("period_s", 0.5), ("trace", 2)])
def test_telemetry_has_no_place_in_a_batch(
    name: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs" / "demo.yaml"
    argv = ["batch", "--config", str(config), "--out", str(tmp_path / "out"), "--set", f"telemetry.{name}={value}"]
    assert main(argv) == 2
    assert f"telemetry.{name} has no effect in batches" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
