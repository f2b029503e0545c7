"""Linear maps from a model's full gradient to k numbers, unbiased for inner products."""

from retrac_scale.projections.base import Projection, Projector, from_spec
from retrac_scale.projections.countsketch import CountSketch
from retrac_scale.projections.identity import Identity
from retrac_scale.projections.lowrank import LowRank
from retrac_scale.projections.sketcher import GradientSketcher

__all__ = ["CountSketch", "GradientSketcher", "Identity", "LowRank", "Projection", "Projector", "from_spec"]
