"""Persistent worker processes for multi-rank tests: started once, given functions to run together.

Starting torch and joining a process group takes seconds, so tests share the pools of ``conftest.py``. A test hands over
an importable function that every rank calls with its own ``LauncherEnv`` and the same arguments.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT_S = 120
RUN_TIMEOUT_S = 180


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankFailedError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """``size`` processes with the environment a launcher gives; ``run`` calls a function on all of them."""

    def __init__(self, size: int, device_type: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.size = size
        self.processes = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port, device_type), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)
        for pipe in self._pipes:
            assert pipe.poll(START_TIMEOUT_S) and pipe.recv() == "ready"

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = RUN_TIMEOUT_S) -> list[Any]:
        """What ``function(*args)`` returned on each rank; RankFailedError if it raised on any."""
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = [self._receive(rank, timeout_s) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        if failures:
            raise RankFailedError("\n".join(failures))
        return [value for _, value in outcomes]

    def _receive(self, rank: int, timeout_s: float) -> tuple[bool, Any]:
        if not self._pipes[rank].poll(timeout_s):
            return False, f"no answer within {timeout_s} s"
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return False, "the process died"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, size: int, port: int, device_type: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR=device_type,
    )
    import torch

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
