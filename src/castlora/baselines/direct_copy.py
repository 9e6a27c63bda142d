"""The source's update as it stands, where the shapes allow it."""

from castlora.adapters.factors import LowRank
from castlora.baselines.carry import BranchWeights


def direct_copy(branch: BranchWeights) -> LowRank | None:
    """The same factors; None where source and target rows differ in shape."""
    return branch.update if branch.source.shape == branch.target.shape else None
