"""Retraining on subsets: resumable, here or on Dask workers."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from retrac_scale.arrays import Bools, Float64
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import Task

if TYPE_CHECKING:
    from distributed import Client

Ids = npt.NDArray[Any]
Train = Callable[[Ids, int], Any]
"""`train(ids, seed)`: a model, or whatever `measure` takes, trained from scratch on these samples alone."""
Measure = Callable[[Any], npt.ArrayLike]
"""`measure(model)`: the loss of each query, `[q]`, with the same timesteps and noise at every call."""


def random_subsets(n: int, count: int, *, size: int | None = None, seed: int = 0) -> Bools:
    """Which samples belong to each random subset, bool `[m, n]`; every subset holds `size` of them, default n // 2."""
    size = n // 2 if size is None else size
    if not 0 < size < n:
        raise ValueError(f"a subset of {n} samples must have between 1 and {n - 1}, got size={size}.")
    rng = np.random.default_rng(seed)
    members = np.zeros((count, n), dtype=bool)
    for row in members:
        row[rng.permutation(n)[:size]] = True
    return members


def retrain(
    subsets: Sequence[Ids],
    train: Train,
    measure: Measure,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    key: str = "",
    client: Client | None = None,
    progress: bool = True,
) -> Float64:
    """Train on every subset and measure the queries; run again, it trains only what is missing.

    One file per subset, named after ids, seed and key, is written atomically, so that runs that are interrupted,
    repeated or spread over workers end with the same folder. Subsets that occur twice are trained once.

    Args:
        subsets: ids of the samples of each of m subsets, in the order in which `train` is to get them.
        train: called as `train(ids, seed)`; must depend on nothing else, so that models differ by their samples alone.
        measure: called with what `train` returned.
        out: a folder for results; with a client, one that its workers reach.
        seed: handed to every `train`.
        key: says what else a result depends on, such as a digest of the queries; with another key, results that are
            there are left alone and not read.
        client: a `distributed.Client`; `train` and `measure` must then be picklable. None trains one after the other.
        progress: show a bar.

    Returns:
        what `measure` gave, float64 `[m, q]`.

    Raises:
        ValueError: a subset is empty, or `measure` gave something else than one finite number per query.
        FailedTasksError: some models could not be trained; all others are done, and the same call trains the rest.
        ConnectionError: the scheduler is gone; what was trained until then stands.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [np.asarray(subset) for subset in subsets]
    empty = [number for number, subset in enumerate(chosen) if not len(subset)]
    if empty:
        raise ValueError(f"subset {empty[0]} has no samples; there is nothing to train on.")
    files = [folder / f"{_name(subset, seed, key)}.npy" for subset in chosen]
    todo = {file: subset for file, subset in zip(files, chosen, strict=True) if not file.exists()}
    tasks = (Task(f"retrain-{file.stem}", (subset, seed, file)) for file, subset in todo.items())
    with tqdm(total=len(todo), unit="model", desc="retrain", disable=not progress) as bar:
        for _ in run(_one, tasks, client, shared=(train, measure), threads=1, fatal=(ValueError,)):
            bar.update()
    measured = [np.load(file) for file in files]
    different = [number for number, values in enumerate(measured) if values.shape != measured[0].shape]
    if different:
        raise ValueError(
            f"{folder} holds the losses of {len(measured[different[0]])} queries for subset {different[0]}, but of "
            f"{len(measured[0])} for subset 0; give each set of queries its own folder."
        )
    return np.stack(measured)


def counterfactual(
    removed: npt.NDArray[Any],
    ids: Ids,
    train: Train,
    measure: Measure,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    key: str = "",
    client: Client | None = None,
    progress: bool = True,
) -> Float64:
    """How the loss of each query changes when its own samples are removed and the model is trained again.

    Positive: without them the query's loss is higher, so they were proponents. All models have the same seed; it
    still moves a loss by chance, so compare with the removal of as many random samples.

    Args:
        removed: ids to remove for each query, `[q, k]`, e.g. `TopK.ids`.
        ids: of all training samples, `[n]`.
        train: see `retrain`.
        measure: losses of these q queries, in the order of `removed`.
        out: see `retrain`; the same folder serves all removals from one training set, since files know their subset.
        seed: see `retrain`.
        key: see `retrain`.
        client: see `retrain`.
        progress: show a bar.

    Returns:
        loss without minus loss with them, float64 `[q]`.

    Raises:
        ValueError: `removed` names an id that is not among `ids`, or as for `retrain`.
    """
    unknown = np.setdiff1d(removed, ids)
    if len(unknown):
        raise ValueError(f"removed names {unknown[0]!s}, which is no training sample; give ids as in ids=.")
    subsets = [ids, *(ids[~np.isin(ids, row)] for row in removed)]
    losses = retrain(subsets, train, measure, out, seed=seed, key=key, client=client, progress=progress)
    if losses.shape[1] != len(removed):
        raise ValueError(
            f"measure gave {losses.shape[1]} losses for {len(removed)} queries; give one per row of removed."
        )
    change: Float64 = np.diagonal(losses[1:]) - losses[0]
    return change


def _one(shared: tuple[Train, Measure], subset: Ids, seed: int, file: Path) -> None:
    train, measure = shared
    values = np.asarray(measure(train(subset, seed)), dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"measure gave an array of shape {values.shape}"
            + " with NaN or inf" * (not np.isfinite(values).all())
            + "; "
            "it must give one finite number per query."
        )
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    with open(partial, "wb") as target:
        np.save(target, values)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, file)


def _name(subset: Ids, seed: int, key: str) -> str:
    listed = repr((key, seed, subset.tolist())).encode()
    return hashlib.blake2b(listed, digest_size=12).hexdigest()
