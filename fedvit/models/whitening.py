"""Whitening of a frozen stem's features by second moments of public photographs.

Private steps on a linear head add the same noise to every coordinate of its weight, while natural features have most of
their energy in a few directions. With ``g_i`` the energy of direction i over N examples of norm one, and ``r`` a ridge,
the noise in the predictions is proportional to ``N sum_i g_i / (g_i + r)^2``. Coordinates in which all directions have
equal energy make it ``(sum_i g_i / (g_i + r))^2``, the least that a linear map of the features can reach: a matrix
mechanism (Li et al. 2010, doi:10.1145/1807085.1807104) for least squares. Public moments cost no privacy.

Moments of channels and of positions are kept apart (a Kronecker product, as in Martens and Grosse 2015,
arXiv:1503.05671): few numbers, which few images show well.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

SIDE = 8
"""Rows and columns of the grid of positions."""
_FILE = "lite0_whitening.safetensors"
_FLOOR = 1.0


class Whitening(nn.Module):
    """Features [B, C, side, side] to coordinates [B, 64 * C] of equal energy over photographs, of L2 norm 1.

    Every channel's mean over the positions is removed before: it is mostly the brightness. Features on another grid are
    averaged or interpolated to 8 x 8.

    Args:
        maps: see :func:`whitening_of`.
    """

    channels: Tensor
    positions: Tensor
    scale: Tensor

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("channels", "positions", "scale"):
            self.register_buffer(name, maps[name])

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.scale.numel()

    def forward(self, features: Tensor) -> Tensor:
        grid = _on_grid(features).flatten(2)
        # As convolutions, which an int8 export leaves in float32: the faint directions, which are scaled up next, would
        # be lost in the rounding of the strong ones.
        turned = functional.conv1d(grid, self.channels.unsqueeze(2)).transpose(1, 2)
        turned = functional.conv1d(turned, self.positions.unsqueeze(2))
        return functional.normalize((turned * self.scale).flatten(1), dim=1)


def whitening_of(features: Tensor) -> dict[str, Tensor]:
    """The maps of a :class:`Whitening` from public features [N, C, side, side], as float32.

    ``channels`` [C, C] and ``positions`` [64, 64] turn into eigenvectors, by rows, and ``scale`` [64, C] divides by the
    root of the energy. To the energies their mean is added, so that faint directions do not become noise.
    """
    grid = _on_grid(features.double()).flatten(2)
    centred = grid - grid.mean(dim=2, keepdim=True)
    centred = centred / centred.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None]
    channel_energy, channels = _axes(torch.einsum("ncp,ndp->cd", centred, centred))
    position_energy, positions = _axes(torch.einsum("ncp,ncq->pq", centred, centred))
    energy = torch.outer(position_energy, channel_energy)
    return {
        "channels": channels.float(),
        "positions": (positions - positions.mean(dim=1, keepdim=True)).float(),
        "scale": (energy + _FLOOR * energy.mean()).rsqrt().float(),
    }


def lite0_whitening() -> dict[str, Tensor]:
    """The maps for stage 2 of EfficientNet-Lite0, 40 channels; ``python -m tests.whitening`` made the file."""
    with as_file(files("fedvit.models") / _FILE) as path:
        maps: dict[str, Any] = load_file(path)
    return maps


def _axes(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Energies, which sum to one, and axes, by rows, the strongest first."""
    values, vectors = torch.linalg.eigh(moment / moment.trace())
    return values.clamp(min=0.0).flip(0), vectors.T.flip(0)


def _on_grid(features: Tensor) -> Tensor:
    side = features.shape[-1]
    if side >= 2 * SIDE:
        features = functional.avg_pool2d(features, side // SIDE)
    if features.shape[-1] != SIDE:
        features = functional.interpolate(features, size=(SIDE, SIDE), mode="bilinear")
    return features
