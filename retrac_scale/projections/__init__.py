"""Linear maps from a model's full gradient to k numbers, unbiased for inner products."""

from retrac_scale.gradients.errors import GradientMismatchError
from retrac_scale.projections.base import Projection, Projector, from_spec
from retrac_scale.projections.countsketch import CountSketch
from retrac_scale.projections.dense import Dense
from retrac_scale.projections.identity import Identity
from retrac_scale.projections.lowrank import LowRank
from retrac_scale.projections.sketcher import GradientSketcher
from retrac_scale.projections.trak_bridge import TrakProjector

__all__ = [
    "CountSketch",
    "Dense",
    "GradientMismatchError",
    "GradientSketcher",
    "Identity",
    "LowRank",
    "Projection",
    "Projector",
    "TrakProjector",
    "from_spec",
]
