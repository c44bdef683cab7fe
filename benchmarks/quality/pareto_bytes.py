"""Bytes that the configurations of ``pareto.py`` send between two expert-parallel ranks, counted."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.common.local_ranks import become_rank, free_port
from moeca_dist.checkpoints.load import load_model
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.runtime.engine import Engine

NUM_RANKS = 2


def bytes_sent(settings: Any, jobs: Sequence[Any], num_images: int) -> dict[str, int]:
    """Payload bytes of every job, both ranks together, for the first images of the first seed."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        spawn(_rank, (free_port(), settings, jobs, num_images, out), nprocs=NUM_RANKS)
        return dict(json.loads(out.read_text()))


def _rank(rank: int, port: int, settings: Any, jobs: Sequence[Any], num_images: int, out: Path) -> None:
    become_rank(rank, NUM_RANKS, port)
    torch.set_num_threads(1)
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu")
    sent = count(mesh, settings, jobs, num_images)
    if rank == 0:
        out.write_text(json.dumps(sent))
    mesh.close()


def count(mesh: Mesh, settings: Any, jobs: Sequence[Any], num_images: int) -> dict[str, int]:
    """By job name; called on all ranks of ``mesh``."""
    model = load_model(settings.checkpoint, mesh=mesh)
    requests = settings.requests(settings.units[0])[:num_images]
    sent = {}
    for job in jobs:
        sampling = {"num_steps": job.num_steps, "cfg_scale": settings.cfg_scale, "batch_size": num_images}
        config = Config.model_validate({"cache": job.cache, "sampling": sampling})
        _, report = Engine(config, mesh, model).generate(requests)
        sent[job.name] = report.exchange.bytes_sent
    return sent
