"""Metrics of attribution: how specific, how biased, how right."""

from retrac_scale.evaluate.agreement import rank_correlation, recall_at, stability
from retrac_scale.evaluate.intervals import Interval, bootstrap, jackknife, percentiles
from retrac_scale.evaluate.lds import lds, lds_mean
from retrac_scale.evaluate.outliers import Detection, detection
from retrac_scale.evaluate.retraining import counterfactual, random_subsets, retrain
from retrac_scale.evaluate.specificity import hubs, largest_share, norm_correlation, unique_fraction

__all__ = [
    "Detection",
    "Interval",
    "bootstrap",
    "counterfactual",
    "detection",
    "hubs",
    "jackknife",
    "largest_share",
    "lds",
    "lds_mean",
    "norm_correlation",
    "percentiles",
    "random_subsets",
    "rank_correlation",
    "recall_at",
    "retrain",
    "stability",
    "unique_fraction",
]
