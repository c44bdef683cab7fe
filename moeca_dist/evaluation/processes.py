"""Division of work among processes: each takes a share, and its results come back as they are made."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from moeca_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Sequence[Item]], Iterator[Result]], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """Yield the results of ``work`` over all items, in no particular order. One worker runs in this process.

    ``work`` is called once in every process with its share and must be picklable. A UserError in a process is raised
    here. Raises RuntimeError if a process fails or dies.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from work(items) if items else ()
        return
    # Not forked: this process may have threads, of which a fork would inherit the locks.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    running: list[Any] = []
    receivers: list[Connection] = []
    try:
        for first in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(sender, work, items[first::workers], threads), daemon=True)
            process.start()
            # Its copy here would keep the pipe open after the process has died.
            sender.close()
            running.append(process)
            receivers.append(receiver)
        yield from _results(receivers)
    finally:
        for process in running:
            process.kill()
            process.join()


def _results(receivers: Sequence[Connection]) -> Iterator[Any]:
    unfinished = list(receivers)
    while unfinished:
        for ready in wait(unfinished):
            assert isinstance(ready, Connection)
            try:
                kind, content = ready.recv()
            except EOFError:
                raise RuntimeError("a process of the evaluation died, perhaps for lack of memory") from None
            if kind == "done":
                unfinished.remove(ready)
            elif kind == "mistake":
                raise UserError(content)
            elif kind == "failure":
                raise RuntimeError(f"a process of the evaluation failed:\n{content}")
            else:
                yield content


def _serve(sender: Connection, work: Callable[[Sequence[Any]], Iterator[Any]], share: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    with threadpool_limits(limits=threads):
        try:
            for result in work(share):
                sender.send(("result", result))
            sender.send(("done", None))
        except UserError as error:
            sender.send(("mistake", str(error)))
        except Exception:
            sender.send(("failure", traceback.format_exc()))
