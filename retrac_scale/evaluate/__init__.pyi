"""The public names; __init__.py imports each from here when it is first used."""

from .agreement import rank_correlation, recall_at, stability
from .datamodeling import lds, lds_mean
from .intervals import Interval, bootstrap, jackknife, percentiles
from .judging import Figure, Groups, Judgement, Subsets, Truth, Wanted, judge, truth, truths
from .originals import Altered, Originals, find_originals
from .outliers import Detection, detection
from .retraining import counterfactual, random_subsets, retrain
from .settings import Setting, setting
from .specificity import hubs, largest_share, norm_correlation, unique_fraction

__all__ = [
    "Altered",
    "Detection",
    "Figure",
    "Groups",
    "Interval",
    "Judgement",
    "Originals",
    "Setting",
    "Subsets",
    "Truth",
    "Wanted",
    "bootstrap",
    "counterfactual",
    "detection",
    "find_originals",
    "hubs",
    "jackknife",
    "judge",
    "largest_share",
    "lds",
    "lds_mean",
    "norm_correlation",
    "percentiles",
    "random_subsets",
    "rank_correlation",
    "recall_at",
    "retrain",
    "setting",
    "stability",
    "truth",
    "truths",
    "unique_fraction",
]
