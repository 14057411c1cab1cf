"""Other coordinates than the pencil's, for comparison: bases of one layer input, and the scale of their columns.

All take both second moments normalised as the pencil does it, C_p ridged.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from folora.pencil import reduced

BasisName = Literal["generalised", "penalty", "utility", "difference", "random", "identity"]


def directions(name: BasisName, penalty: Tensor, utility: Tensor, *, seed: int = 0) -> Tensor:
    """Columns of unit length that span the input space.

    Args:
        name: eigenvectors of C_t v = λ C_p v (``generalised``), of C_p, of C_t, of C_t - C_p; a random orthogonal
            basis; or the canonical one.
        penalty: (d, d) C_p.
        utility: (d, d) C_t.
        seed: of the random basis.

    Returns:
        (d, d); orthogonal but for ``generalised``.
    """
    d = penalty.shape[0]
    if name == "generalised":
        _, V = reduced(torch.linalg.cholesky(penalty), utility)
        return V / V.norm(dim=0)
    if name == "random":
        noise = torch.randn(d, d, dtype=penalty.dtype, generator=torch.Generator().manual_seed(seed))
        return torch.linalg.qr(noise)[0].to(penalty.device)
    if name == "identity":
        return torch.eye(d, dtype=penalty.dtype, device=penalty.device)
    symmetric = {"penalty": penalty, "utility": utility, "difference": utility - penalty}[name]
    return torch.linalg.eigh(symmetric)[1]


def energies(basis: Tensor, moment: Tensor) -> Tensor:
    """vᵀ C v of every column, (d,)."""
    return (basis * (moment @ basis)).sum(0)


def quotients(basis: Tensor, penalty: Tensor, utility: Tensor) -> Tensor:
    """The generalised Rayleigh quotient (vᵀ C_t v) / (vᵀ C_p v) of every column, (d,)."""
    return energies(basis, utility) / energies(basis, penalty)


def scaled(basis: Tensor, penalty: Tensor, columns: Literal["penalty", "unit"]) -> Tensor:
    """Scale the columns: to one penalty each, or to length one; the Frobenius norm is √d either way."""
    lengths = energies(basis, penalty).sqrt() if columns == "penalty" else basis.norm(dim=0)
    even = basis / lengths
    return even * (math.sqrt(basis.shape[1]) / even.norm())
