"""Orthogonal Procrustes on activations, in the manner of Theseus, arXiv 2602.12952: ΔW_t = T_outᵀ ΔW_s T_in.

T_in and T_out are the orthogonal maps (between unequal widths with orthonormal shorter side) that bring the target's
activations closest to the source's on the same text. Partial whitening, which the paper offers, is left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from castlora.adapters.factors import LowRank
from castlora.maps.fitting import SiteMoments, input_site
from castlora.maps.starts import BranchMaps, fold_maps
from castlora.models.pairing import Pairing


def theseus(pairing: Pairing, factors: Mapping[str, LowRank], moments: SiteMoments) -> dict[str, LowRank]:
    """Carries every paired module's update by rotations of its input and output.

    Args:
        pairing: which modules belong together
        factors: the source adapter, by module
        moments: sums over aligned positions of both bare models' activations

    Returns:
        updates by target module
    """
    maps = {}
    for pair, index, branch in pairing.branches():
        key = pair.target.name, index
        _, input_covariance = moments.inputs[input_site(pair, branch)].covariances()
        _, output_covariance = moments.outputs[key].covariances()
        to_source, from_source = procrustes(input_covariance), procrustes(output_covariance)
        maps[key] = BranchMaps(to_source.float().cpu(), from_source.float().cpu())
    return fold_maps(pairing, factors, maps)


def procrustes(cross_covariance: Tensor) -> Tensor:
    """The semi-orthogonal T that minimises E|T x - y|² over rotations: the polar factor of cov(y, x).

    Args:
        cross_covariance: cov(y, x), shape (d_y, d_x)

    Returns:
        T, shape (d_y, d_x)
    """
    u, _, v_t = torch.linalg.svd(cross_covariance, full_matrices=False)
    rotation: Tensor = u @ v_t
    return rotation
