"""What each attribution method makes of a store: one small class each."""

from retrac_scale.estimators.base import Estimator, Pairing, common_timesteps, estimator_from_spec
from retrac_scale.estimators.inner import GradCos, GradDot, ReTrac, TracIn
from retrac_scale.estimators.regression import DAS, DTRAK, TRAK, RelatIF, RenormIF, ReTracRidge, of_losses, recommended

__all__ = [
    "DAS",
    "DTRAK",
    "TRAK",
    "Estimator",
    "GradCos",
    "GradDot",
    "Pairing",
    "ReTrac",
    "ReTracRidge",
    "RelatIF",
    "RenormIF",
    "TracIn",
    "common_timesteps",
    "estimator_from_spec",
    "of_losses",
    "recommended",
]
