"""Detecting planted samples by a score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Detection:
    """How well a score finds planted samples.

    Attributes:
        auroc: area under the ROC curve: the chance that a planted sample scores above another; 0.5 is blind.
        auprc: scikit-learn's average precision; blind is the share of planted samples.
        recall: share of the planted samples among the k with the largest scores.
        k: that k.
    """

    auroc: float
    auprc: float
    recall: float
    k: int


def detection(scores: npt.ArrayLike, planted: npt.ArrayLike, k: int | None = None) -> Detection:
    """AUROC, AUPRC and recall@k of a score on planted samples; larger scores mean "planted".

    Args:
        scores: `[n]`, e.g. `self_influence(store, TracIn())`.
        planted: bool `[n]`.
        k: default, as many as are planted.

    Raises:
        ValueError: all samples or none are planted, a score is NaN, or k is not between 1 and n.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values, truth = np.asarray(scores), np.asarray(planted, dtype=bool)
    if truth.all() or not truth.any():
        raise ValueError(f"{truth.sum()} of {len(truth)} samples are planted; there must be some of each kind.")
    if (missing := int(np.isnan(values).sum())) > 0:
        raise ValueError(
            f"{missing} of {len(values)} scores are NaN, as those of deleted samples; pass scores[store.alive] and "
            "planted[store.alive]."
        )
    k = int(truth.sum()) if k is None else k
    if not 1 <= k <= len(values):
        raise ValueError(f"k must be between 1 and {len(values)}, got {k}.")
    first = np.argsort(-values, kind="stable")[:k]
    return Detection(
        auroc=float(roc_auc_score(truth, values)),
        auprc=float(average_precision_score(truth, values)),
        recall=float(truth[first].sum() / truth.sum()),
        k=k,
    )
