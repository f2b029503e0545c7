"""Exact scores of a few candidates, from full gradients that are never stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
from retrac_scale.estimators import Estimator
from retrac_scale.projections import GradientSketcher, Identity
from retrac_scale.sketching.content import ITEM, ChangedItemsError, digest_of, stored_contents
from retrac_scale.sketching.pairs import measured_pairs
from retrac_scale.sketching.samples import Samples
from retrac_scale.store import SketchStore
from retrac_scale.store.compatibility import compared
from retrac_scale.store.part import measures_in, plans_of
from retrac_scale.store.reader import Words
from retrac_scale.store.schema import differences
from retrac_scale.task.checkpoints import borrowed_weights
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import Item, brought
from retrac_scale.task.noising import scheduler_spec
from retrac_scale.task.timesteps import Pairs, TimestepPlan, grid_from_spec, plan_digest

BATCH_PAIRS = 64
BATCH_BYTES = 256 * 2**20


def as_measured(train: Samples, store: SketchStore) -> Samples:
    """The training samples with the store's measure and plans in its order, once they are known to give its pairs.

    Every timestep and noise seed of the store's samples is compared, by the digests in its fingerprint.

    Raises:
        ValueError: the store has several measures side by side, or they would be measured otherwise; says what differs.
    """
    if len(measures := measures_in(store.fingerprint)) > 1:
        raise ValueError(f"rerank takes gradients of one function, not of {' and '.join(measures)} side by side.")
    train = of_measure(train, store.fingerprint)
    given = {"measure": train.task.measure, "scheduler": scheduler_spec(train.task.scheduler)}
    given["frozen"] = {**train.task.frozen, **(brought(train.dataset, "frozen") or {})}
    given["forward"] = train.task.forward
    given |= {name: brought(train.dataset, name) for name in ("region", "concept")}
    found = differences(*compared("rerank", store.fingerprint, given))
    stored = plans_of(store.fingerprint)
    known = train.plans if train.timesteps is not None else [grid_from_spec(spec) for spec in stored]
    if None in known:
        raise ValueError("rerank needs the training record: give train=rs.Samples(..., timesteps=Recorded(path)).")
    own: list[TimestepPlan] = [plan for plan in known if plan is not None]
    specs = [plan.spec() for plan in own]
    if len(specs) != len(stored) or any(spec not in specs for spec in stored):
        found.append(f"timesteps are {stored} there and {specs} here")
    if found:
        raise ValueError(f"the store was measured otherwise than train=: {'; '.join(found)}; use the same.")
    plans = [own[specs.index(spec)] for spec in stored]
    for part in store.parts:
        if not isinstance(part.fingerprint["timesteps"], Mapping):
            raise ValueError("rerank needs an index of a whole store, not of samples taken from one; use where= there.")
        plan = plans[stored.index(plans_of(part.fingerprint)[0])]
        pairs = {name: plan.pairs(name, part.ids, train.task.num_train_timesteps) for name in part.checkpoints}
        if plan_digest(pairs) != part.fingerprint["timesteps"]["digest"]:
            raise ValueError(
                f"the store was measured at other timesteps or noise than {plan} gives; use the same record."
            )
    return replace(train, timesteps=plans)


def of_measure(samples: Samples, fingerprint: Mapping[str, Any]) -> Samples:
    """The same with that measure alone which a store or an index is of, where their task has it among several."""
    measure, task = fingerprint.get("measure"), samples.task
    return replace(samples, task=task.only(measure)) if measure in task.measures else samples


def exact_scores(
    queries: Samples,
    train: Samples,
    candidates: npt.NDArray[Any],
    estimator: Estimator,
    weights: Mapping[str, float],
    fingerprint: Mapping[str, Any],
    sketched: tuple[SketchStore, SketchStore] | None = None,
) -> npt.NDArray[np.float64]:
    """sum_c w_c <row(c,q), row(c,i)> with rows made of full float32 gradients, `[q, m]`.

    A checkpoint's query rows are formed once and held, q times the number of parameters; candidates pass in batches.

    Args:
        queries: the queries, with the plans that `Samples.sketch` measures them by.
        train: the training samples.
        candidates: ids of m of them.
        estimator: makes rows of gradients as it makes them of sketches.
        weights: w_c.
        fingerprint: that of the index; checkpoints and parameters must be the same.
        sketched: the sketches of queries and training samples, whose items must be the same; None compares nothing.

    Raises:
        ChangedItemsError: an item is another than the one that was sketched.
        ValueError: a candidate is not in the dataset, or a checkpoint is missing or another one.
    """
    queries, train = of_measure(queries, fingerprint), of_measure(train, fingerprint)
    places = {sample: row for row, sample in enumerate(train.ids.tolist())}
    lost = [sample for sample in candidates.tolist() if sample not in places]
    if lost:
        raise ValueError(
            f"the training dataset has no sample {lost[0]!r}, which the index holds; pass the same dataset."
        )
    rows = np.array([places[sample] for sample in candidates.tolist()])
    every = np.arange(len(queries.ids))
    known = (
        [None, None]
        if sketched is None
        else [stored_contents(store, ids) for store, ids in zip(sketched, (queries.ids, candidates), strict=True)]
    )
    scores = np.zeros((len(every), len(rows)))
    for name, weight in weights.items():
        asked = np.concatenate([part for _, part in _full_rows(queries, every, name, estimator, fingerprint, known[0])])
        for batch, part in _full_rows(train, rows, name, estimator, fingerprint, known[1]):
            scores[:, batch] += weight * (asked @ part.T)
    return scores


def _full_rows(
    samples: Samples,
    chosen: npt.NDArray[Any],
    checkpoint: str,
    estimator: Estimator,
    fingerprint: Mapping[str, Any],
    known: Words | None,
) -> Iterator[tuple[slice, Float32]]:
    """The estimator's rows of chosen samples at a checkpoint, some of them at a time."""
    task = samples.task
    if checkpoint not in samples.checkpoints:
        raise ValueError(f"rerank needs checkpoint {checkpoint!r}; give it in checkpoints=, as when sketching.")
    with borrowed_weights(task.model):
        if task.load(checkpoint, samples.checkpoints[checkpoint]) != fingerprint["checkpoints"][checkpoint]:
            raise ValueError(f"checkpoint {checkpoint!r} has other weights than the one that the index was made with.")
        sketcher = GradientSketcher(task.model, Identity(), parameters=list(fingerprint["parameters"]).__contains__)
        shapes = {name: list(shape) for name, shape in sketcher.shapes.items()}
        if found := differences({"parameters": fingerprint["parameters"]}, {"parameters": shapes}):
            raise ValueError(f"rerank needs the parameters that the index is of: {'; '.join(found)}; use the same.")
        ids = samples.ids[chosen]
        plans = [plan.pairs(checkpoint, ids, task.num_train_timesteps) for plan in samples.plans]
        t = sum(plan.timesteps.shape[1] for plan in plans)
        size = max(1, min(BATCH_PAIRS, BATCH_BYTES // (4 * sketcher.dim)) // t)
        with sketcher:
            for start in range(0, len(chosen), size):
                batch = slice(start, min(start + size, len(chosen)))
                items = [
                    task.encoded(
                        _same_item(task, ids[place], samples.dataset[int(row)], None if known is None else known[place])
                    )
                    for place, row in enumerate(chosen[batch], batch.start)
                ]
                gradients = np.empty((len(items), t, sketcher.dim), np.float32)
                norms = np.empty((len(items), t), np.float32)
                column = 0
                for plan in plans:
                    part = plan.some(batch)
                    for places, gradient, norm in _gradients(sketcher, task, items, ids[batch], part):
                        rows, steps = np.divmod(places, plan.timesteps.shape[1])
                        gradients[rows, column + steps], norms[rows, column + steps] = gradient, norm
                    column += plan.timesteps.shape[1]
                yield batch, estimator.collapse(gradients, norms)


def _same_item(task: DiffusionTask, number: Any, given: Any, known: Words | None) -> Item:
    """An item, which is the one that was sketched, as far as that is known."""
    item = task.read_item(number, given)
    if known is not None and known[ITEM] not in (0, digest_of(item)):
        raise ChangedItemsError(
            f"sample {number!s} is another item here than the one that was sketched; give the data set that was, or "
            "sketch it anew with replace=True and build the index again.",
            [number],
        )
    return item


def _gradients(
    sketcher: GradientSketcher, task: DiffusionTask, items: list[Any], ids: npt.NDArray[Any], plan: Pairs
) -> Iterator[tuple[npt.NDArray[np.int64], Float32, Float32]]:
    """Places in `plan.timesteps`, full gradients and norms of all pairs of some samples, some at a time."""
    size = max(1, min(BATCH_PAIRS // plan.draws, BATCH_BYTES // (4 * sketcher.dim)))
    for first in range(0, plan.timesteps.size, size):
        some = np.arange(first, min(first + size, plan.timesteps.size))
        gradient, norm = sketcher(measured_pairs(task, items, ids, plan, some)[0][0])
        yield some, gradient.cpu().numpy(), norm.cpu().numpy()
