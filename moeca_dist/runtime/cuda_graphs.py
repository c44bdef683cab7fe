"""CUDA graphs: a whole evaluation of the network captured once, then replayed as one launch.

What a replay launches was fixed when it was captured, so everything that the host decides must be the same again:

- Without a cache all steps are of one kind. The first runs eagerly, the second is captured, the others are replays.
- With one, the host counts on the step's index: ages and forecast factors are numbers, a full step makes new tensors.
  So the graphs of a round form a chain, one for every step, on a session of their own. Everything that the session
  keeps is made within them, from the empty cache before step 0 on, and stays where it is: replayed from step 0 in
  order, the chain is the same program on the same memory for other images. A first round runs eagerly (kernels are
  compiled and libraries set up, which a capture does not allow), a second is captured, and later ones are replays.

There is one set of graphs for every number of images, because shapes follow from it, with memory of its own. Its
session stays as long as the engine.

Shape suffixes: N network rows (B images, or 2B with guidance), C channels, H and W (latent) pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moeca_dist.cache.policy import Policy
from moeca_dist.cache.session import HALVES, CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.sampling.guidance import Network
from moeca_dist.timing import UNTIMED, Timer
from moeca_dist.types import Request, StepContext

MakeNetwork = Callable[[CacheSession | None, Timer], Network]
OpenSession = Callable[[CacheStatistics, Timer], CacheSession]

_ALIGNED = 8  # bfloat16 values of 16 bytes, whole units of which a grouped product wants


class Recording(Protocol):
    @property
    def output(self) -> Tensor:
        """What the recorded work returned; every replay writes it anew."""
        ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Record what ``work`` launches, in place of running it."""
        ...


@dataclass(frozen=True)
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Captures on a side stream, which ``torch.cuda.graph`` brings; all graphs share one pool of memory.

    Sharing is sound because the graphs are captured and replayed in one order.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # Other threads (telemetry, process groups) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return _CudaRecording(graph, output)


@dataclass
class GraphCounts:
    """Evaluations of the network: run ``eager``, and launched as graphs (``replayed``), ``captured`` for it before."""

    eager: int = 0
    captured: int = 0
    replayed: int = 0

    def add(self, other: "GraphCounts") -> None:
        self.eager += other.eager
        self.captured += other.captured
        self.replayed += other.replayed


class _Chain:
    """The graphs of one number of images, and the tensors that they read."""

    def __init__(self, network: Network, session: CacheSession | None, recorder: Recorder) -> None:
        self.session = session
        self.recordings: dict[int, Recording] = {}
        self._network = network
        self._recorder = recorder
        self._inputs: list[Tensor] = []

    def run(self, inputs: Sequence[Tensor], step: StepContext, counts: GraphCounts) -> Tensor:
        if not self._inputs:
            self._inputs = [torch.empty_like(given) for given in inputs]
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        kind = 0 if self.session is None else step.index
        if kind not in self.recordings:
            x_NCHW, t_N, y_N = self._inputs
            self.recordings[kind] = self._recorder.record(lambda: self._network(x_NCHW, t_N, y_N, step))
            counts.captured += 1
        self.recordings[kind].replay()
        counts.replayed += 1
        # The next replay overwrites it, and callers may remember outputs.
        return self.recordings[kind].output.clone()


@dataclass
class Round:
    """One round's network; ``finish`` when it is done. ``chain`` None: all of it runs eagerly."""

    eager: Network
    session: CacheSession | None
    chain: _Chain | None
    statistics: CacheStatistics
    timer: Timer
    counts: GraphCounts
    on_warm: Callable[[], None]
    is_warm: bool = field(default=False)

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor:
        if self.chain is None or not self.is_warm:
            self.counts.eager += 1
            self.is_warm = True
            return self.eager(x_NCHW, t_N, y_N, step)
        with self.timer.section("graph"):
            return self.chain.run((x_NCHW, t_N, y_N), step, self.counts)

    def finish(self) -> None:
        """All steps are done: other rounds of as many images need no warm-up, and what the session did counts."""
        self.on_warm()
        if self.session is None:
            return
        self.session.note_peak()
        if self.session.statistics is not self.statistics:
            self.statistics.add_round(self.session.statistics)


class StepGraphs:
    """All graphs of an engine. Evaluations that are not replayed are counted, never left unsaid."""

    def __init__(self, make_recorder: Callable[[], Recorder], num_steps: int) -> None:
        self._make_recorder = make_recorder
        self._num_steps = num_steps
        self._chains: dict[int, _Chain] = {}
        self._warm: set[int] = set()

    def begin(
        self,
        requests: Sequence[Request],
        make_network: MakeNetwork,
        open_session: OpenSession | None,
        statistics: CacheStatistics,
        timer: Timer,
        counts: GraphCounts,
    ) -> Round:
        """The network of one round; ``open_session`` None: without a cache.

        ``make_network`` binds a network to a session and a timer. Captured ones are not timed section by section.
        """
        images = len(requests)
        is_warm = images in self._warm

        def on_warm() -> None:
            self._warm.add(images)

        def round_of(session: CacheSession | None, chain: _Chain | None) -> Round:
            return Round(make_network(session, timer), session, chain, statistics, timer, counts, on_warm, is_warm)

        if open_session is None:
            return round_of(None, self._chain(images, make_network, None))
        if not is_warm:
            return round_of(open_session(statistics, timer), None)
        known = self._chains.get(images)
        if known is None or known.session is None or len(known.recordings) < self._num_steps:
            # A chain that a failed round left unfinished is of no use: its session is somewhere in the middle.
            self._chains.pop(images, None)
            session = open_session(CacheStatistics(), UNTIMED)
            return round_of(session, self._chain(images, make_network, session))
        known.session.assign(requests)
        return round_of(known.session, known)

    def _chain(self, images: int, make_network: MakeNetwork, session: CacheSession | None) -> _Chain:
        if images not in self._chains:
            self._chains[images] = _Chain(make_network(session, UNTIMED), session, self._make_recorder())
        return self._chains[images]


def step_graphs(
    config: Config, policy: Policy | None, spec: ModelSpec, mesh: Mesh, num_steps: int
) -> StepGraphs | None:
    """The graphs that ``model.cuda_graphs`` asks for, None where it does not.

    Raises UserError where no step, or not every step, can be captured.
    """
    if not config.model.cuda_graphs:
        return None
    check_graphs(config, policy, spec, num_steps)
    if mesh.device.type != "cuda":
        raise UserError("model.cuda_graphs needs a CUDA device, and the model runs on the CPU here: remove it")
    if mesh.ep_size > 1:
        raise UserError(
            f"model.cuda_graphs: the {mesh.ep_size} ranks of an expert-parallel group agree on sizes on the host, in "
            "full steps whatever the exchange mode: set parallel.ep_size=1 (each rank then holds all experts), or "
            "remove model.cuda_graphs"
        )
    return StepGraphs(CudaRecorder, num_steps)


def check_graphs(config: Config, policy: Policy | None, spec: ModelSpec, num_steps: int) -> None:
    """Raise UserError for ``model.cuda_graphs`` where what a step launches follows from the data."""
    if not config.model.cuda_graphs:
        return
    reason = _not_static(config, policy, num_steps)
    if reason is None and config.model.dtype != "bfloat16":
        reason = "products of grouped experts read their sizes on the host in other dtypes: set model.dtype=bfloat16"
    if reason is None and (spec.hidden_size % _ALIGNED or spec.expert_width % _ALIGNED):
        reason = (
            f"experts of {spec.hidden_size} x {spec.expert_width} are no multiples of {_ALIGNED} and run one by one"
        )
    if reason is not None:
        raise UserError(f"model.cuda_graphs cannot be used here: {reason}, or remove model.cuda_graphs")


def _not_static(config: Config, policy: Policy | None, num_steps: int) -> str | None:
    """Why the shapes of some step, or whether something runs in it, follow from the data; None where they do not."""
    if policy is None:
        return None
    name = config.cache.policy
    if policy.delta is not None:
        return f"cache.policy {name} decides in every step, from the data, whether the network runs: choose another"
    if policy.attention_sync or policy.refreshes_rows:
        return f"cache.policy {name} computes as many rows as the data asks for: choose another, without attention_sync"
    if policy.unit != "branch":
        return None
    if config.parallel.exchange != "budget":
        return f"cache.policy {name} computes as many branches as the data asks for: set parallel.exchange=budget"
    for step in (StepContext(index, num_steps, 0.0) for index in range(num_steps)):
        if config.sampling.cfg_scale != 1 and len({policy.is_full(step, half) for half in HALVES}) > 1:
            which = (
                f"step {step.index}, in which one guidance half is full, computes as many branches as the data asks for"
            )
            return f"{which}: give one list of full steps"
    return None
