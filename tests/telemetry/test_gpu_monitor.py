"""Telemetry against a stand-in for NVML: figures and their units, what a device lacks, what is said without one."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from moeca_dist import Engine, Request, UserError
from moeca_dist.cli import main
from moeca_dist.config import Config, load_config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.report.plots import write_plots
from moeca_dist.report.tables import render
from moeca_dist.telemetry import gpu as telemetry
from moeca_dist.telemetry.gpu import MAX_POINTS, GpuMonitor, GpuRecord, GpuSampler, TelemetryUnavailableError, merge
from tests.helpers.fake_nvml import UUID, FakeNvml
from tests.helpers.golden_files import load_golden

PERIOD_S = 0.05
DEVICE = torch.device("cpu")  # what the stand-in claims to be a GPU


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "device_uuid", lambda device: UUID)


def watch(nvml: FakeNvml, seconds: float, period_s: float = PERIOD_S) -> GpuRecord:
    with GpuSampler(GpuMonitor.open(DEVICE, nvml), period_s) as sampler:
        time.sleep(seconds)
    return sampler.record()


def test_figures_have_their_units(one_gpu) -> None:
    record = watch(FakeNvml(), 0.5)
    assert 0.45 < record.seconds < 2 and 8 <= record.num_samples <= 42 and record.ended_early is None
    assert (record.device, record.uuid) == ("NVIDIA Fake", UUID)
    # One reading more than samples: the figure was tried once.
    assert record.memory_bytes_peak == (record.num_samples + 1) * 2**20
    assert record.utilisation_mean == 0.75 and record.power_w_mean == record.power_w_max == 300
    assert record.energy_j == pytest.approx(300 * record.seconds, rel=0.02)
    assert record.throttled == {"software power cap": pytest.approx(0.5, abs=0.1)}
    assert record.pcie_bytes == {
        "sent": pytest.approx(1e6 * record.seconds),
        "received": pytest.approx(2e6 * record.seconds),
    }
    assert record.nvlink_bytes == {
        "sent": pytest.approx(2**30 * record.seconds, rel=0.02),
        "received": pytest.approx(2**31 * record.seconds, rel=0.02),
    }
    assert {len(values) for values in record.series.values()} == {record.num_samples}
    assert median(record.series["nvlink_sent_bytes_per_s"]) == pytest.approx(2**30, rel=0.1)
    assert record.series["time_s"] == sorted(record.series["time_s"])


def test_what_a_device_lacks_is_left_out_and_energy_follows_from_power(one_gpu) -> None:
    lacking = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPcieThroughput", 138, "nvmlDeviceGetMemoryInfo")
    record = watch(FakeNvml(lacking), 0.2)
    assert record.energy_j == pytest.approx(300 * record.seconds)
    assert record.pcie_bytes is None and record.nvlink_bytes is None and record.memory_bytes_peak is None
    assert set(record.series) == {"time_s", "utilisation", "power_w", "nvlink_received_bytes_per_s"}
    bare = watch(FakeNvml((*lacking, "nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons")), 0.1)
    assert bare.energy_j is None and bare.power_w_mean is None and bare.throttled is None


def test_a_run_shorter_than_the_period_has_its_beginning_and_its_end(one_gpu) -> None:
    record = watch(FakeNvml(), 0.1, period_s=60)
    assert record.num_samples == 2 and 0.09 < record.seconds < 1


def test_a_device_that_fails_ends_sampling_and_nothing_else(one_gpu) -> None:
    record = watch(FakeNvml(fails_after=3), 0.3)
    assert record.ended_early == "GPU is lost" and record.num_samples == 2 and record.utilisation_mean == 0.75
    nothing = watch(FakeNvml(fails_after=1), 0.1)
    assert nothing.num_samples == 0 and nothing.seconds == 0 and nothing.energy_j is None


def test_the_thread_takes_less_than_a_hundredth_of_the_time(one_gpu) -> None:
    record = watch(FakeNvml(), 1.0, period_s=0.1)
    assert record.num_samples >= 9 and 0 < record.sampler_cpu_share < 0.01


def test_long_runs_are_thinned(one_gpu) -> None:
    sampler = GpuSampler(GpuMonitor.open(DEVICE, FakeNvml()), 1)
    count = 10 * MAX_POINTS + 3
    names = sampler._gpu.offered
    sampler._samples = [(float(second), dict.fromkeys(names, float(second))) for second in range(count)]
    record = sampler.record()
    assert {len(values) for values in record.series.values()} == {count // 11 + 1}
    assert record.series["time_s"][:2] == [5, 16] and record.memory_bytes_peak == count - 1


def test_without_a_driver_or_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TelemetryUnavailableError, match="this run computes on the CPU"):
        GpuMonitor.open(DEVICE, FakeNvml())
    monkeypatch.setattr(telemetry, "device_uuid", lambda device: UUID)
    with pytest.raises(TelemetryUnavailableError, match="NVML says: NVML Shared Library Not Found"):
        GpuMonitor.open(DEVICE, FakeNvml(driver=False))
    monkeypatch.setattr(telemetry, "device_uuid", lambda device: "GPU-of-another-machine")
    with pytest.raises(TelemetryUnavailableError, match="NVML says: Not Found"):
        GpuMonitor.open(DEVICE, FakeNvml())


def test_devices_are_found_by_name_and_not_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for uuid in ("12345678-abcd", UUID):  # with or without the prefix that NVML wants
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert telemetry.device_uuid(torch.device("cuda", 1)) == UUID
    assert telemetry.device_uuid(DEVICE) is None


def test_shared_devices_count_once(one_gpu) -> None:
    record = watch(FakeNvml(), 0.1)
    first, second = replace(record, energy_j=100.0), replace(record, uuid="GPU-other", energy_j=50.0)
    merged = merge([first, first, second, None], 0.5, num_images=10)
    assert merged is not None and merged["energy_j"] == 150 and merged["energy_j_per_image"] == 15
    assert [rank is None for rank in merged["ranks"]] == [False, False, False, True]
    unknown = merge([first, replace(second, energy_j=None)], 0.5, num_images=10)
    assert unknown is not None and unknown["energy_j"] is None and unknown["energy_j_per_image"] is None
    assert merge([None, None], 0.5, num_images=10) is None


# ---- in a run --------------------------------------------------------------------------------------------------------


def make_config(folder: Path, **options: Any) -> Config:
    golden = load_golden("dsmoe_e8")
    path = folder / "model.pt"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "sampling": {"num_steps": 4, "batch_size": 2},
            "telemetry": options,
        }
    )


def requests(count: int) -> list[Request]:
    return [Request(index, index % 10, seed=5) for index in range(count)]


def test_the_report_has_it_and_shows_it(one_gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(telemetry, "pynvml", nvml)
    engine = Engine.from_config(make_config(tmp_path, period_s=0.1))
    images, found = engine.generate(requests(3))
    report = json.loads(found.to_json())
    assert report["telemetry"]["period_s"] == 0.1
    (record,) = report["telemetry"]["ranks"]
    # The sampler covers the run, images delivered included, and hardly more.
    assert report["denoise_s"] <= record["seconds"] <= report["wall_s"]
    assert report["telemetry"]["energy_j_per_image"] == pytest.approx(100 * record["seconds"], rel=0.05)
    shown = render(report)
    assert "J per image" in shown and "NVIDIA Fake" in shown and "75% busy, 300 W (up to 300)" in shown
    assert "slowed by software power cap" in shown and "NVLink" in shown and "PCIe" in shown
    drawn = [path for path in write_plots(report, tmp_path) if path.name == "telemetry.png"]
    assert len(drawn) == 1 and Image.open(drawn[0]).height > 600
    plain, without = Engine.from_config(make_config(tmp_path)).generate(requests(3))
    assert without.telemetry is None and "GPUs" not in render(json.loads(without.to_json()))
    assert (plain == images).all()
    engine.close()
    assert not nvml.is_open


def test_without_a_driver_it_is_said_once_and_the_run_goes_on(one_gpu, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(telemetry, "pynvml", FakeNvml(driver=False))
    with caplog.at_level(logging.WARNING):
        engine = Engine.from_config(make_config(tmp_path, period_s=0.1))
        assert all(engine.generate(requests(1))[1].telemetry is None for _ in range(2))
        engine.without_cache().generate(requests(1))
    said = [record.getMessage() for record in caplog.records if "telemetry" in record.getMessage()]
    assert said == ["telemetry.period_s is set, but there is no GPU to watch: NVML says: NVML Shared Library Not Found"]
    caplog.clear()
    Engine.from_config(make_config(tmp_path))
    assert not caplog.records


def watch_on_rank(config: Config) -> tuple[list[str], Any]:
    """What was logged on this rank, and the report's telemetry; only rank 1 has a driver."""
    launcher = LauncherEnv.read()
    mesh = Mesh.create(launcher, ep_size=2, device_type="cpu", timeout_s=60)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moeca_dist.telemetry.observer").addHandler(handler)
    kept = telemetry.pynvml, telemetry.device_uuid
    telemetry.pynvml, telemetry.device_uuid = FakeNvml(driver=launcher.rank == 1), lambda device: UUID  # type: ignore
    try:
        _, report = Engine.from_config(config, mesh=mesh).generate(requests(3))
    finally:
        telemetry.pynvml, telemetry.device_uuid = kept  # type: ignore[assignment]
        logging.getLogger("moeca_dist.telemetry.observer").removeHandler(handler)
    return said, report.telemetry


def test_ranks_may_differ_in_what_they_can_watch(two_ranks, tmp_path: Path) -> None:
    (first_said, first), (second_said, second) = two_ranks.run(watch_on_rank, make_config(tmp_path, period_s=0.1))
    assert len(first_said) == 1 and "no GPU to watch" in first_said[0] and second_said == []
    assert first == second and first["ranks"][0] is None and first["ranks"][1]["device"] == "NVIDIA Fake"


@pytest.mark.parametrize(("key", "value"), [("period_s", "0.01"), ("period_s", "0"), ("trace", "0"), ("trace", "true")])
def test_values_out_of_range_are_refused(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    with pytest.raises(UserError, match=f"telemetry.{key} must be"):
        load_config(path, [f"telemetry.{key}={value}"])


def test_the_command_line_writes_no_traces_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(make_config(tmp_path).to_yaml())
    argv = ["generate", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--num-images", "1"]
    assert main(argv) == 0 and not (tmp_path / "out" / "traces").exists()
