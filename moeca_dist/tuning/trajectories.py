"""Exact trajectories in few coordinates: what the proxy computes with.

Everything that an open-loop run can put together is a linear combination, with scalars that all images share, of the
recorded outputs and states. So their inner products are all that matters, and as neighbouring steps are nearly alike,
some tens of coordinates hold them: the size no longer depends on images and pixels.

Shape suffixes: B images, H guidance halves, N steps, M recorded tensors (of all halves and the states, step by step), P
values of one image (guided channels x pixels), R and Q coordinates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.parallel.mesh import Mesh
from moeca_dist.tuning.calibrate import Recording, summed

# Relative to the largest: 120 dB below what is recorded, far under the error of any cached run.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Profile:
    """Recorded tensors as float64 coordinates in an orthonormal basis over all ranks' images and pixels.

    ``halves_HNR`` and ``states_NR`` are what each half gave and where the solver stood in each step of the exact run.
    ``share_BRR``: the basis restricted to single images, so that ``d @ share_BRR[b] @ d`` is the squared norm in image
    b of what has coordinates d. ``values_per_image``: P.
    """

    halves_HNR: Tensor
    states_NR: Tensor
    share_BRR: Tensor
    values_per_image: int
    guidance_scale: float

    @property
    def num_halves(self) -> int:
        return self.halves_HNR.shape[0]

    @property
    def num_steps(self) -> int:
        return self.states_NR.shape[0]

    @property
    def outputs_NR(self) -> Tensor:
        """What the solver got in each exact step."""
        if self.num_halves == 1:
            return self.halves_HNR[0]
        conditional_NR, unconditional_NR = self.halves_HNR
        return unconditional_NR + self.guidance_scale * (conditional_NR - unconditional_NR)


def make_profile(recording: Recording, mesh: Mesh) -> Profile:
    """Compress a recording that kept its halves. A collective of the world; the same numbers on all ranks."""
    exact = recording.exact
    by_half = [list(outputs) for outputs in zip(*exact.halves, strict=True)]
    recorded = [tensor for outputs in by_half for tensor in outputs] + exact.states
    tensors_BMP = torch.stack([tensor.flatten(1) for tensor in recorded], dim=1)
    products = [images_MP.double() @ images_MP.double().T for images_MP in tensors_BMP]
    num_recorded = tensors_BMP.shape[1]
    mine_MM = sum(products, torch.zeros(num_recorded, num_recorded, dtype=torch.float64, device=tensors_BMP.device))
    basis_MR, coordinates_MR = _compressed(summed(mesh, mine_MM).cpu())
    rank = coordinates_MR.shape[1]
    mine_BRR = torch.empty(len(products), rank, rank, dtype=torch.float64)
    for image, products_MM in enumerate(products):
        mine_BRR[image] = basis_MR.T @ products_MM.cpu() @ basis_MR
    shares = [mine_BRR] if mesh.world is None else mesh.world.gather_objects(mine_BRR)
    *halves, states_NR = coordinates_MR.split(len(exact.states))
    scale = exact.guidance.scale
    return Profile(torch.stack(halves), states_NR, torch.cat(shares), tensors_BMP.shape[2], scale)


def _compressed(products_MM: Tensor) -> tuple[Tensor, Tensor]:
    """Recorded tensors -> the orthonormal basis as their combinations [M, R], and their coordinates in it [M, R]."""
    energy_M, vectors_MM = torch.linalg.eigh(products_MM)
    kept = energy_M > NEGLIGIBLE * energy_M[-1]
    scale_R, vectors_MR = energy_M[kept].sqrt(), vectors_MM[:, kept]
    return vectors_MR / scale_R, vectors_MR * scale_R
