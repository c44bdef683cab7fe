"""The driver of a batch from start to end: supervisor, gangs, progress, signals, and the final assembly."""

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeca_dist.config import Config
from moeca_dist.errors import IncompleteError, PeerLostError, UserError
from moeca_dist.ray_batch.assembly import assemble
from moeca_dist.ray_batch.cluster import actor_class, describe_nodes, gangs_that_fit
from moeca_dist.ray_batch.gang import Gang, GangPlan
from moeca_dist.ray_batch.ledger import Plan
from moeca_dist.ray_batch.progress import Board, ProgressBar
from moeca_dist.ray_batch.supervisor import Status, Supervisor
from moeca_dist.report.schema import Report

logger = logging.getLogger(__name__)

TICK_S = 0.5
STOP_TIMEOUT_S = 30.0
SUPERVISOR_TRIES = 3
# Reading back every image of a large batch takes its time; everything else is short.
CALL_TIMEOUT_S = 300.0
VERIFY_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class Batch:
    """The plan of a batch.

    ``config`` is saved with the results. The configuration in ``gang_plan`` also names the device. With
    ``fixed_cluster`` no node can join, so gangs that do not fit now never will.
    """

    config: Config
    plan: Plan
    gang_plan: GangPlan
    gangs: int
    fixed_cluster: bool
    placement_timeout_s: float


class SupervisorHandle:
    """A handle for calls to the supervisor. Ray restarts a supervisor that dies, this handle one that hangs."""

    def __init__(self, plan: Plan) -> None:
        # On the driver's node: that is where the output folder is known to be.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = actor_class(Supervisor, "files")
        self._actor = remote.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote(
            plan
        )

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the supervisor and return its answer.

        Raises the supervisor's own errors, and PeerLostError if it does not answer.
        """
        timeout_s = VERIFY_TIMEOUT_S if method == "verify" else CALL_TIMEOUT_S
        for _ in range(SUPERVISOR_TRIES):
            call = getattr(self._actor, method).remote(*args, **kwargs)
            try:
                return await asyncio.wait_for(_value(call), timeout_s)
            except TimeoutError:
                logger.warning("the supervisor did not answer within %g s; it is restarted", timeout_s)
                ray.kill(self._actor, no_restart=False)
            except ray.exceptions.RayTaskError as error:
                # The error itself, without the traceback of the other process that Ray makes its message.
                raise error.cause from None
            except ray.exceptions.ActorDiedError as error:
                raise PeerLostError("the supervisor died for good, with its node; go on with --resume") from error
        raise PeerLostError(f"the supervisor did not answer {SUPERVISOR_TRIES} times; go on with --resume")

    def kill(self) -> None:
        with suppress(Exception):
            ray.kill(self._actor, no_restart=True)


def run_batch(batch: Batch) -> Report:
    """Generate the images that are not yet recorded and assemble the results. Needs a connection to Ray.

    Raises UserError for a batch that cannot run. Raises IncompleteError if chunks were given up or the disk is full.
    Recorded images stay then. Raises PeerLostError if no gang is left, and KeyboardInterrupt or SystemExit after a
    signal.
    """
    supervisor = SupervisorHandle(batch.plan)
    try:
        with _handlers_restored():
            asyncio.run(_Driver(batch, supervisor).run())
        return _assemble(batch)
    finally:
        # It holds the folder's lock until everything is in place.
        supervisor.kill()


class _Driver:
    def __init__(self, batch: Batch, supervisor: SupervisorHandle) -> None:
        self._batch = batch
        self._supervisor = supervisor
        self._board = Board()
        self._signal: int | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None

        def stop(number: int) -> None:
            self._signal = number
            main.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        try:
            await self._run()
        except asyncio.CancelledError:
            if self._signal is None:
                raise
            logger.warning("stopped by %s; go on with --resume", signal.Signals(self._signal).name)
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + self._signal) from None

    async def _run(self) -> None:
        plan = self._batch.plan
        repair = await self._supervisor("begin", gangs=self._batch.gangs)
        if repair is not None:
            logger.warning(repair)
        before: Status = await self._supervisor("status")
        if before.images:
            logger.info("checking %d recorded images", before.images)
            for problem in await self._supervisor("verify"):
                logger.warning("%s; its chunk is generated anew", problem)
        status: Status = await self._supervisor("status")
        if not status.remaining:
            return
        gangs = self._number_of_gangs(status)
        logger.info(
            "%d of %d images are left, in %d chunks of up to %d; %d gangs of %s",
            plan.num_images - status.images,
            plan.num_images,
            status.remaining,
            plan.chunk_size,
            gangs,
            self._batch.gang_plan.shape,
        )
        bar = ProgressBar(plan.num_images, status.images)
        tasks = {
            asyncio.create_task(Gang(number, self._batch.gang_plan, self._supervisor, self._board).run())
            for number in range(gangs)
        }
        try:
            await self._attend(tasks, bar)
        finally:
            bar.close()
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
            for task in ended:
                # The batch ends with the first error; asyncio would complain that nobody looked at the others.
                _ = task.cancelled() or task.exception()

    async def _attend(self, tasks: set["asyncio.Task[None]"], bar: ProgressBar) -> None:
        """Until no chunk remains; raises what ended the last gang where some do."""
        deadline = asyncio.get_running_loop().time() + self._batch.placement_timeout_s
        working = set(tasks)
        while True:
            done, working = await asyncio.wait(working, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            status: Status = await self._supervisor("status")
            bar.show(status, self._board)
            for task in done:
                self._look_at(task, alone=not working and status.remaining > 0)
            if not status.remaining or not working:
                return
            if set(self._board.states.values()) != {"waiting"}:
                deadline = float("inf")
            elif asyncio.get_running_loop().time() > deadline:
                self._refuse_if_too_large()

    def _look_at(self, task: "asyncio.Task[None]", *, alone: bool) -> None:
        """Whether the end of one gang is the end of the batch."""
        error = task.exception()
        if isinstance(error, OSError):
            raise IncompleteError(
                f"cannot write to {self._batch.plan.folder}: {error.strerror or error}; what is recorded stays: make "
                "room and go on with --resume"
            ) from error
        if error is None:
            return
        if alone or not isinstance(error, UserError | PeerLostError):
            raise error
        logger.error("%s; the other gangs work on", error)

    def _number_of_gangs(self, status: Status) -> int:
        gangs = min(self._batch.gangs, status.remaining)
        if gangs < self._batch.gangs:
            logger.info("%d chunks are left: %d gangs are enough", status.remaining, gangs)
        fitting = gangs_that_fit(self._batch.gang_plan.shape, gangs)
        if fitting == gangs:
            return gangs
        shape = self._batch.gang_plan.shape
        if self._batch.fixed_cluster:
            self._refuse_if_too_large()
        logger.warning(
            "the cluster holds %d of %d gangs of %s (%s); the others wait for more nodes",
            fitting,
            gangs,
            shape,
            describe_nodes(),
        )
        return gangs

    def _refuse_if_too_large(self) -> None:
        shape = self._batch.gang_plan.shape
        if not gangs_that_fit(shape, 1):
            raise UserError(
                f"the cluster cannot hold a single gang of {shape}; its nodes have {describe_nodes()}: lower "
                "--gang-size, change --strategy or --bundles, or add nodes"
            )


def _assemble(batch: Batch) -> Report:
    plan, shape = batch.plan, batch.gang_plan.shape
    logger.info("assembling the results")
    try:
        report = assemble(plan, batch.config, batch.gangs, shape.size)
    except (OSError, ValueError) as error:
        raise IncompleteError(f"cannot assemble the results: {error}; go on with --resume") from error
    quarantined = [] if report is None or report.batch is None else report.batch["quarantined"]
    if report is None:
        raise IncompleteError(f"every chunk failed {plan.max_tries} times; see {plan.folder / 'manifest.jsonl'}")
    if quarantined:
        names = ", ".join(f"{entry['first']}-{entry['first'] + entry['count'] - 1}" for entry in quarantined)
        raise IncompleteError(
            f"images {names} are missing: their chunks failed {plan.max_tries} times ({quarantined[0]['problem']}); "
            f"the other {report.num_images} are in {plan.folder}; --resume tries again"
        )
    return report


async def _value(ref: Any) -> Any:
    return await ref


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """asyncio forgets which handlers its own have replaced."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
