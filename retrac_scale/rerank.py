"""Exact scores of a few candidates, from full gradients that are never stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.estimators import Estimator
from retrac_scale.projections import GradientSketcher, Identity
from retrac_scale.samples import Samples
from retrac_scale.sketching import measured_pairs
from retrac_scale.store.encoding import Float32
from retrac_scale.timesteps import Pairs

BATCH_PAIRS = 64
BATCH_BYTES = 256 * 2**20


def exact_scores(
    queries: Samples,
    train: Samples,
    candidates: npt.NDArray[Any],
    estimator: Estimator,
    weights: Mapping[str, float],
    fingerprint: Mapping[str, Any],
) -> npt.NDArray[np.float64]:
    """sum_c w_c <row(c,q), row(c,i)> with rows made of full float32 gradients, `[q, m]`.

    A checkpoint's query rows are formed once and held, q times the number of parameters; candidates pass in batches.

    Args:
        queries: the queries.
        train: the training samples.
        candidates: ids of m of them.
        estimator: makes rows of gradients as it makes them of sketches.
        weights: w_c.
        fingerprint: that of the index; checkpoints and parameters must be the same.

    Raises:
        ValueError: a candidate is not in the dataset, or a checkpoint is missing or another one.
    """
    places = {sample: row for row, sample in enumerate(train.ids.tolist())}
    lost = [sample for sample in candidates.tolist() if sample not in places]
    if lost:
        raise ValueError(
            f"the training dataset has no sample {lost[0]!r}, which the index holds; pass the same dataset."
        )
    rows = np.array([places[sample] for sample in candidates.tolist()])
    every = np.arange(len(queries.ids))
    scores = np.zeros((len(every), len(rows)))
    for name, weight in weights.items():
        asked = np.concatenate([part for _, part in _full_rows(queries, every, name, estimator, fingerprint)])
        for batch, part in _full_rows(train, rows, name, estimator, fingerprint):
            scores[:, batch] += weight * (asked @ part.T)
    return scores


def _full_rows(
    samples: Samples, chosen: npt.NDArray[Any], checkpoint: str, estimator: Estimator, fingerprint: Mapping[str, Any]
) -> Iterator[tuple[slice, Float32]]:
    """The estimator's rows of chosen samples at a checkpoint, some of them at a time."""
    task = samples.task
    if checkpoint not in samples.checkpoints:
        raise ValueError(f"rerank needs checkpoint {checkpoint!r}; give it in checkpoints=, as when sketching.")
    before = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
    try:
        if task.load(checkpoint, samples.checkpoints[checkpoint]) != fingerprint["checkpoints"][checkpoint]:
            raise ValueError(f"checkpoint {checkpoint!r} has other weights than the one that the index was made with.")
        sketcher = GradientSketcher(task.model, Identity(), parameters=list(fingerprint["parameters"]).__contains__)
        ids = samples.ids[chosen]
        plan = samples.timesteps.pairs(checkpoint, ids, task.num_train_timesteps)
        t = plan.timesteps.shape[1]
        pairs = max(1, min(BATCH_PAIRS // plan.draws, BATCH_BYTES // (4 * sketcher.dim)))
        size = max(1, pairs // t)
        with sketcher:
            for start in range(0, len(chosen), size):
                batch = slice(start, min(start + size, len(chosen)))
                part = Pairs(plan.timesteps[batch], plan.seeds[batch], plan.draws)
                items = [
                    task.check_item(i, samples.dataset[int(row)])
                    for i, row in zip(ids[batch], chosen[batch], strict=True)
                ]
                gradients = np.empty((len(items) * t, sketcher.dim), np.float32)
                norms = np.empty(len(items) * t, np.float32)
                for first in range(0, len(gradients), pairs):
                    some = np.arange(first, min(first + pairs, len(gradients)))
                    gradient, norm = sketcher(measured_pairs(task, items, ids[batch], part, some)[0])
                    gradients[some], norms[some] = gradient.cpu().numpy(), norm.cpu().numpy()
                shape = (len(items), t)
                yield batch, estimator.collapse(gradients.reshape(*shape, -1), norms.reshape(shape))
    finally:
        task.model.load_state_dict(before)
