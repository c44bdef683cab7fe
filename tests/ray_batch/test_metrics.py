"""What a rank tells Ray's metrics of its GPU, against a stand-in for NVML."""

import logging

import pytest
import torch
from ray.util.metrics import Gauge

from moeca_dist.ray_batch.metrics import RankMetrics
from moeca_dist.telemetry import gpu as telemetry
from tests.helpers.fake_nvml import UUID, FakeNvml


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """Gauges as they are set."""
    values: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags: values.append((gauge.info["name"], value, tags)))
    monkeypatch.setattr(telemetry, "device_uuid", lambda device: UUID)
    return values


def metrics_of(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> RankMetrics:
    monkeypatch.setattr(telemetry, "pynvml", nvml)
    return RankMetrics(1, 0, torch.device("cuda"))


def test_memory_and_power(told, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics_of(FakeNvml(), monkeypatch).note_gpu()
    tags = {"gang": "1", "rank": "0"}
    # One reading on opening, to see what is offered.
    assert told == [("moeca_gpu_memory_bytes", 2 * 2**20, tags), ("moeca_gpu_power_watts", 300.0, tags)]


def test_what_a_device_lacks_is_left_out(told, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics_of(FakeNvml(missing=["nvmlDeviceGetPowerUsage"]), monkeypatch).note_gpu()
    assert [name for name, *_ in told] == ["moeca_gpu_memory_bytes"]


@pytest.mark.parametrize(
    ("nvml", "said"),
    [(FakeNvml(driver=False), "no figures of the GPU: NVML says"), (FakeNvml(fails_after=1), "GPU is lost")],
    ids=["no driver", "lost"],
)
def test_a_device_that_fails_is_said_once(
    told, nvml: FakeNvml, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = metrics_of(nvml, monkeypatch)
        metrics.note_gpu()
        metrics.note_gpu()
    assert told == [] and len(caplog.records) == 1 and said in caplog.text
