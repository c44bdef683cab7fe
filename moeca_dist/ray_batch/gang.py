"""A gang as the driver sees it: placed, formed, fed with chunks, watched, and formed anew if it is lost.

A gang is a placement group with one actor per rank. If one of its ranks is lost, all of them end: their collectives can
no longer complete. The next ranks are new processes that join a new group.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moeca_dist.config import Config
from moeca_dist.errors import PeerLostError, UserError
from moeca_dist.ray_batch.cluster import GangShape, actor_class, dead_nodes, describe_nodes
from moeca_dist.ray_batch.progress import Board
from moeca_dist.ray_batch.supervisor import Chunk
from moeca_dist.ray_batch.worker import Progress, Worker, WorkerAddress

logger = logging.getLogger(__name__)

POLL_S = 0.25
WATCH_S = 0.5
WAITING_REPORT_S = 10.0
# After the first rank has failed, how long to wait for the one that is the cause.
CAUSE_S = 1.0
NODE_NOTICE_S = 5.0
MAX_FAILED_STARTS = 5
ADDRESS_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class GangPlan:
    """The settings that all gangs of a batch share. Times are in seconds."""

    config: Config
    shape: GangShape
    start_timeout_s: float
    progress_timeout_s: float
    worker: type[Worker] = Worker


class GangLostError(Exception):
    """The loss of a gang: a rank failed, died or hung. The message names the rank and the cause.

    ``innocent`` is True if a node was lost.
    """

    def __init__(self, message: str, *, innocent: bool = False) -> None:
        super().__init__(message)
        self.innocent = innocent


Call = Callable[..., Awaitable[Any]]


class Gang:
    """A gang that runs until no chunk remains, or until it cannot be started."""

    def __init__(self, number: int, plan: GangPlan, supervisor: Call, board: Board) -> None:
        self._number = number
        self._plan = plan
        self._supervisor = supervisor
        self._board = board
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._nodes: set[str] = set()
        self._commit: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        self._lost_because = ""
        self._note: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Run the gang to its end.

        Raises UserError if the gang can never start, and PeerLostError if it failed to start too often.
        """
        failed_starts = 0
        try:
            while True:
                try:
                    await self._form()
                    failed_starts = 0
                    await self._serve()
                    return
                except GangLostError as error:
                    starting = self._board.states[self._number] == "starting"
                    failed_starts += starting and not error.innocent
                    self._note_loss(error)
                    if failed_starts >= MAX_FAILED_STARTS:
                        self._board.states[self._number] = "given up"
                        raise PeerLostError(
                            f"gang {self._number} failed to start {failed_starts} times: {error}"
                        ) from error
                finally:
                    self._release()
        except UserError:
            self._board.states[self._number] = "given up"
            raise
        finally:
            await self._finish_commit()

    # ---- forming -----------------------------------------------------------------------------------------------------

    async def _form(self) -> None:
        self._board.states[self._number] = "waiting"
        shape = self._plan.shape
        self._placement = placement_group(shape.resources, strategy=shape.strategy, name=f"moeca-gang-{self._number}")
        await self._placed(self._placement)
        self._board.states[self._number] = "starting"
        started = time.monotonic()
        remote = actor_class(self._plan.worker, "watch")
        self._actors = [
            remote.options(
                num_cpus=1,
                num_gpus=1 if shape.on_gpu else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, bundle),
            ).remote(self._number, rank)
            for rank, bundle in enumerate(shape.bundle_of_rank)
        ]
        finds = [actor.find_address.remote() for actor in self._actors]
        addresses: list[WorkerAddress] = await self._all(finds, ADDRESS_TIMEOUT_S)
        self._nodes = {each.node_id for each in addresses}
        logger.info(
            "gang %d starts on %s: processes %s",
            self._number,
            ", ".join(sorted({each.host for each in addresses})),
            " ".join(str(each.pid) for each in addresses),
        )
        joins = [actor.join.remote(self._plan.config, addresses) for actor in self._actors]
        devices = await self._all(joins, self._plan.start_timeout_s)
        kinds = ", ".join(sorted(set(devices)))
        logger.info(
            "gang %d is ready after %.1f s: %d x %s", self._number, time.monotonic() - started, len(devices), kinds
        )

    async def _placed(self, placement: PlacementGroup) -> None:
        """Wait for the resources, for as long as it takes: the others work on meanwhile."""
        report_at = time.monotonic() + WAITING_REPORT_S
        while placement_group_table(placement)["state"] != "CREATED":
            if time.monotonic() > report_at:
                report_at = float("inf")
                logger.warning(
                    "gang %d waits for %s; the nodes have %s", self._number, self._plan.shape, describe_nodes()
                )
            await asyncio.sleep(POLL_S)

    def _release(self) -> None:
        """End every process of the gang and give its resources back."""
        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor, no_restart=True)
        if self._placement is not None:
            with suppress(Exception):
                remove_placement_group(self._placement)
        self._actors, self._placement = [], None
        self._board.steps.pop(self._number, None)

    # ---- working -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            chunk: Chunk | None = await self._supervisor("lease", frozenset(self._board.in_flight))
            if chunk is None:
                self._board.states[self._number] = "idle"
                await self._finish_commit()
                if (await self._supervisor("status")).remaining == 0:
                    return
                # What another gang is at may yet come back.
                await asyncio.sleep(POLL_S)
                continue
            self._board.in_flight.add(chunk.id)
            self._board.states[self._number] = "generating"
            try:
                report, files = await self._generate(chunk)
            except GangLostError as error:
                await self._give_back(chunk, str(error), counts=not error.innocent)
                raise
            except BaseException:
                self._board.in_flight.discard(chunk.id)
                raise
            await self._finish_commit()
            self._commit = asyncio.create_task(self._make_durable(chunk, report, files))

    async def _generate(self, chunk: Chunk) -> tuple[dict[str, Any], ray.ObjectRef]:
        """The chunk's report and a reference to its files, which never pass through the driver."""
        results = [actor.generate.remote(chunk.id, chunk.requests) for actor in self._actors]
        reports = await self._all([report for report, _ in results], None)
        return reports[0], results[0][1]

    async def _make_durable(self, chunk: Chunk, report: dict[str, Any], files: ray.ObjectRef) -> None:
        try:
            await self._supervisor("commit", chunk.id, files, self._number, report)
            self._board.in_flight.discard(chunk.id)
        except OSError:
            raise
        except Exception as error:
            # The files may have been lost with the node that held them; they can be made again.
            await self._give_back(chunk, f"could not be stored: {_one_line(error)}", counts=True)

    async def _finish_commit(self) -> None:
        commit, self._commit = self._commit, None
        if commit is not None:
            # A commit is short and goes on in the supervisor: it is waited for even when the gang is told to stop.
            await asyncio.shield(commit)

    async def _give_back(self, chunk: Chunk, problem: str, *, counts: bool) -> None:
        given_up = await self._supervisor("fail", chunk, problem, counts)
        self._board.in_flight.discard(chunk.id)
        if given_up:
            logger.error("chunk %d is given up: %s", chunk.id, problem)

    # ---- watching ----------------------------------------------------------------------------------------------------

    async def _all(self, refs: Sequence[Any], timeout_s: float | None) -> list[Any]:
        """The answers of all ranks; raises GangLostError as soon as one fails, or shows no progress for too long.

        Without ``timeout_s`` the ranks are watched: each has to take a step within the progress timeout.
        """
        answers = [_ask(ref) for ref in refs]
        watch = None if timeout_s is not None else asyncio.ensure_future(self._watch(answers))
        try:
            waiting = [*answers, watch] if watch is not None else answers
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            pending = set(answers)
            while pending:
                left = None if deadline is None else deadline - time.monotonic()
                done, _ = await asyncio.wait(
                    [task for task in waiting if not task.done() or task is watch],
                    timeout=left,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    raise GangLostError(f"ranks did not start within {timeout_s:g} s")
                if watch is not None and watch in done:
                    watch.result()
                pending -= done
                if any(task.exception() is not None for task in done):
                    await self._raise_cause(answers)
            return [answer.result() for answer in answers]
        finally:
            for task in (*answers, watch):
                if task is not None:
                    task.cancel()

    async def _watch(self, answers: Sequence["asyncio.Future[Any]"]) -> None:
        """Raises GangLostError when a rank that still has work has not taken a step for too long."""
        timeout_s = self._plan.progress_timeout_s
        seen: list[Progress | None] = [None] * len(self._actors)
        moved = [time.monotonic()] * len(self._actors)
        asked: list[asyncio.Future[Progress] | None] = [None] * len(self._actors)
        while True:
            await asyncio.sleep(WATCH_S)
            for rank, actor in enumerate(self._actors):
                answer = asked[rank]
                if answer is None:
                    asked[rank] = _ask(actor.progress.remote())
                elif answer.done():
                    asked[rank] = None
                    if answer.exception() is None and answer.result() != seen[rank]:
                        seen[rank], moved[rank] = answer.result(), time.monotonic()
                        self._note_progress(rank, answer.result())
                if not answers[rank].done() and time.monotonic() - moved[rank] > timeout_s:
                    raise GangLostError(f"rank {rank} hangs: no step for {timeout_s:g} s")

    def _note_progress(self, rank: int, progress: Progress) -> None:
        if rank:
            return
        self._board.steps[self._number] = progress.steps
        if self._lost_at is not None and progress.steps:
            seconds = time.monotonic() - self._lost_at
            self._lost_at = None
            logger.info("gang %d generates again %.1f s after it was lost", self._number, seconds)
            facts = {"gang": self._number, "seconds": round(seconds, 2), "because": self._lost_because}
            self._note = asyncio.ensure_future(self._supervisor("note", "rebuilt", **facts))

    async def _raise_cause(self, answers: Sequence["asyncio.Future[Any]"]) -> None:
        """Raise for the rank that failed first: the others only report that they lost it."""
        await asyncio.wait(answers, timeout=CAUSE_S, return_when=asyncio.ALL_COMPLETED)
        failures = [(rank, task.exception()) for rank, task in enumerate(answers) if task.done() and task.exception()]
        rank, error = min(failures, key=lambda failure: isinstance(failure[1], PeerLostError))
        if isinstance(error, UserError):
            raise UserError(f"gang {self._number}: {_one_line(error)}") from error
        lost = await self._lost_nodes(error)
        if lost:
            raise GangLostError(f"node {', '.join(node[:8] for node in lost)} was lost", innocent=True) from error
        raise GangLostError(f"rank {rank}: {_one_line(error)}") from error

    async def _lost_nodes(self, error: BaseException | None) -> set[str]:
        """Nodes of the gang that are gone; where a rank cannot be reached, Ray may take a moment to know why."""
        deadline = time.monotonic() + (NODE_NOTICE_S if isinstance(error, ActorUnavailableError) else 0.0)
        while not (lost := self._nodes & dead_nodes()) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        return lost

    def _note_loss(self, error: GangLostError) -> None:
        state, self._board.states[self._number] = self._board.states[self._number], "lost"
        if self._lost_at is None:
            self._lost_at, self._lost_because = time.monotonic(), str(error)
        logger.warning("gang %d was lost while %s: %s; it is formed anew", self._number, state, error)


def _ask(ref: Any) -> "asyncio.Future[Any]":
    """The value of a reference when it is there; nobody has to look at it."""

    async def value() -> Any:
        return await ref

    task = asyncio.ensure_future(value())
    # Otherwise asyncio complains about errors of ranks whose gang was given up for another one's error.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _one_line(error: BaseException | None) -> str:
    """The error that a rank raised, without the traceback that Ray wraps around it."""
    cause = getattr(error, "cause", None) or error
    if isinstance(error, ActorDiedError):
        return "its process died"
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}" if not isinstance(cause, PeerLostError | UserError) else text
