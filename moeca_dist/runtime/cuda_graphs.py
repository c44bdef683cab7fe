"""CUDA graphs: an evaluation of the whole network is captured once for each input shape, then replayed.

They serve runs without a cache on ranks that hold all experts. Such an evaluation launches the same kernels with the
same shapes every time. So its graph needs no state but the tensors that it reads and writes.

Shape suffixes: N network rows (B images, or 2B with guidance), C channels, H and W (latent) pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.spec import ModelSpec
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.sampling.guidance import Model
from moeca_dist.timing import UNTIMED, Timer

_ALIGNED = 8  # bfloat16 values of 16 bytes, whole units of which a grouped product wants


@dataclass(frozen=True)
class Recording:
    """Recorded work: ``replay`` repeats it on the same memory and writes ``output`` anew."""

    replay: Callable[[], None]
    output: Tensor


def record_on_cuda(work: Callable[[], Tensor]) -> Recording:
    """Record in a CUDA graph what ``work`` launches. The recorded kernels do not run yet."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (telemetry, process groups) may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = work()
    return Recording(graph.replay, output)


class GraphedModel:
    """A model without a cache that replays its evaluations, from one graph for each input shape."""

    def __init__(self, model: Model, record: Callable[[Callable[[], Tensor]], Recording] = record_on_cuda) -> None:
        self._model = model
        self._record = record
        self._graphs: dict[torch.Size, tuple[tuple[Tensor, ...], Recording]] = {}

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, timer: Timer = UNTIMED) -> Tensor:
        """Return what the model returns. The first call with a shape captures it."""
        with timer.section("graph"):
            if x_NCHW.shape not in self._graphs:
                self._graphs[x_NCHW.shape] = self._capture(x_NCHW, t_N, y_N)
            inputs, recording = self._graphs[x_NCHW.shape]
            for kept, given in zip(inputs, (x_NCHW, t_N, y_N), strict=True):
                kept.copy_(given)
            recording.replay()
            # The next replay overwrites the output, and solvers remember earlier ones.
            return recording.output.clone()

    def _capture(self, *given: Tensor) -> tuple[tuple[Tensor, ...], Recording]:
        inputs = tuple(tensor.clone() for tensor in given)
        self._model(*inputs)  # compiles kernels and sets up libraries, which a capture does not allow
        return inputs, self._record(partial(self._model, *inputs))


def graphed_model(config: Config, model: DiffusionTransformer, mesh: Mesh) -> GraphedModel | None:
    """Return ``model`` with CUDA graphs if configured, else None. Raises UserError if they cannot be captured here."""
    if not config.model.cuda_graphs:
        return None
    check_graphs(config, model.spec)
    if mesh.device.type != "cuda":
        raise UserError("model.cuda_graphs needs a CUDA device, and the model runs on the CPU here: remove it")
    if mesh.ep_size > 1:
        raise UserError(
            f"model.cuda_graphs: the {mesh.ep_size} ranks of an expert-parallel group agree on sizes on the host: set "
            "parallel.ep_size=1 (each rank then holds all experts), or remove model.cuda_graphs"
        )
    return GraphedModel(model)


def check_graphs(config: Config, spec: ModelSpec) -> None:
    """Raise UserError for ``model.cuda_graphs`` if evaluations launch different kernels, or wait for the host."""
    if not config.model.cuda_graphs:
        return
    if config.cache.policy != "none":
        reason = f"cache.policy {config.cache.policy} computes other parts in other steps: set cache.policy=none"
    elif config.model.dtype != "bfloat16":
        reason = "products of grouped experts read their sizes on the host in other dtypes: set model.dtype=bfloat16"
    elif spec.hidden_size % _ALIGNED or spec.expert_width % _ALIGNED:
        reason = f"experts of {spec.hidden_size} x {spec.expert_width} are no multiples of {_ALIGNED}"
    else:
        return
    raise UserError(f"model.cuda_graphs cannot be used here: {reason}, or remove model.cuda_graphs")
