"""What attribution methods are tried on: images, a model trained on them, queries; and their sketches, kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from retrac_scale.estimators import Estimator
from retrac_scale.evaluate.settings import Images
from retrac_scale.task.checkpoints import load_checkpoint

Scores = dict[str, Any]
"""{kind of query: `[q, n]`}."""


@dataclass(frozen=True)
class Measurement:
    """How samples are measured: a store of training samples and one of each kind of query.

    Attributes:
        plan: of timesteps; None for those that were recorded in training.
        projection: None for the default of the plan.
        every: all checkpoints, or the last alone.
        queries: their plan, where it is another.
        measure: what is differentiated.
    """

    plan: Any
    projection: Any = None
    every: bool = False
    queries: Any = None
    measure: str = "mse"


@dataclass(frozen=True, eq=False)
class Lab:
    """Training images, a model at some checkpoints, queries of some kinds, and a folder for what is made of them.

    Attributes:
        train: what the model was trained on.
        queries: {kind: images}.
        untrained: makes a model, untrained(seed) one with the random weights of a seed.
        scheduler: the model's.
        checkpoints: {name: weights}, the last one last.
        record: folder of the training record.
        folder: for sketches.
        trainer: `trainer(ids, seed)` gives the last weights of another training; None where nothing is trained anew.
    """

    train: Images
    queries: Mapping[str, Images]
    untrained: Callable[..., Any]
    scheduler: Any
    checkpoints: Mapping[str, Any]
    record: Path
    folder: Path
    trainer: Callable[[Any, int], Any] | None = None
    _tasks: dict[str, rs.DiffusionTask] = field(default_factory=dict)

    def some(self, kinds: Any) -> Lab:
        """The same, asked about fewer kinds of queries."""
        return replace(self, queries={kind: self.queries[kind] for kind in kinds})

    def at(self, name: str, weights: Any) -> Lab:
        """The same, of a model with other weights."""
        return replace(self, checkpoints={name: weights}, folder=self.folder / name)

    @property
    def last(self) -> dict[str, Any]:
        """The last checkpoint."""
        return dict([list(self.checkpoints.items())[-1]])

    def task(self, measure: str = "mse") -> rs.DiffusionTask:
        """What is differentiated."""
        if measure not in self._tasks:
            self._tasks[measure] = rs.DiffusionTask(self.untrained(), self.scheduler, measure=measure)  # type: ignore[arg-type]
        return self._tasks[measure]

    @cached_property
    def model(self) -> Any:
        """The model with its last weights."""
        model = self.untrained()
        load_checkpoint(model, "last", next(iter(self.last.values())))
        return model.eval()

    def sketched(self, name: str, how: Measurement) -> tuple[rs.SketchStore, dict[str, rs.SketchStore], float]:
        """The training samples, the queries of each kind, and the CPU seconds that it took to sketch all of them."""
        plan = how.plan or rs.Recorded(self.record)
        checkpoints = self.checkpoints if how.every else self.last
        store, seconds = self._sketch(
            name, self.train, how.measure, checkpoints, timesteps=plan, projection=how.projection
        )
        queries = {}
        for kind, images in self.queries.items():
            place = f"{name}, {kind}, {digest(images)}"
            options: dict[str, Any] = {"timesteps": how.queries or how.plan, "like": store}
            queries[kind], more = self._sketch(place, images, how.measure, checkpoints, **options)
            seconds += more
        return store, queries, seconds

    def _sketch(
        self, name: str, images: Images, measure: str, checkpoints: Mapping[str, Any], **options: Any
    ) -> tuple[rs.SketchStore, float]:
        place, file = self.folder / f"{name}.zarr", self.folder / f"{name}.json"
        if file.exists():
            return rs.open_store(place), float(json.loads(file.read_text())["seconds"])
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped: seconds are of the whole
        started = time.process_time()
        task = self.task(measure)
        store = rs.sketch(task, images, place, checkpoints=checkpoints, batch_size=64, progress=False, **options)
        seconds = time.process_time() - started
        file.write_text(json.dumps({"seconds": seconds}))
        return store, seconds


def digest(images: Images) -> str:
    """Of what is asked."""
    found = hashlib.blake2b(digest_size=6)
    for values in (images.images, *images.given.values()):
        found.update(values.numpy().tobytes())
    return found.hexdigest()


def scored(store: rs.SketchStore, queries: Mapping[str, rs.SketchStore], estimator: Estimator, dtype: Any) -> Scores:
    """What an index answers, signed even where the estimator squares."""
    with warnings.catch_warnings():  # matched pairing of own noise is a row of the table
        warnings.filterwarnings("ignore", message="matched pairing compares")
        index = rs.build_index(store, estimator, None, dtype=dtype)
    return {kind: scores_of(index, index.query_rows(one)) for kind, one in queries.items()}


def scores_of(index: rs.Index, rows: Any) -> Any:
    """Scores `[q, n]` by rows `[c, q, k]`, signed."""
    c, _, _ = index.shape
    stored = np.concatenate(
        [np.stack([r.astype(np.float64) for r in index.chunk(i).rows]) for i in range(len(index.chunks))], 1
    )
    scale = np.concatenate([index.chunk(i).scale for i in range(len(index.chunks))], 1).astype(np.float64)
    return sum(rows[i].astype(np.float64) @ (stored[i] * scale[i][:, None]).T for i in range(c))


def forward_features(model: Any, scheduler: Any, every: Mapping[str, Images]) -> dict[str, Scores]:
    """What a forward pass under common noise gives, `{name: {kind: [n, 4, 512 or fewer]}}`, without a gradient."""
    task = rs.DiffusionTask(model, scheduler)
    middle = (
        model.mid_block if hasattr(model, "mid_block") else model.transformer_blocks[len(model.transformer_blocks) // 2]
    )
    kept: list[Any] = []
    hook = middle.register_forward_hook(lambda _, __, output: kept.append(output))
    found: dict[str, Scores] = {"middle activations": {}, "outputs": {}}
    plan = rs.EvenlySpaced(4).pairs("", np.arange(1), task.num_train_timesteps)
    with torch.no_grad():
        for kind, images in every.items():
            activations, outputs = [], []
            for step in plan.timesteps[0]:
                steps = torch.full((len(images),), int(step))
                noise = rs.draw_noise(images.images.shape[1:], None, steps, 0)
                noisy = task.noising.noisy(images.images, noise, steps)
                kept.clear()
                outputs.append(task.call(model, noisy, task.noising.times(steps), dict(images.given)).flatten(1))
                activations.append(kept[0].flatten(1))
            for name, values in (("middle activations", activations), ("outputs", outputs)):
                found[name][kind] = folded(torch.stack(values, 1).numpy(), 512)
    hook.remove()
    return found


def folded(values: Any, dim: int) -> Any:
    """Features `[n, t, p]` in `dim` entries by a random signed fold, or as they are where they are fewer."""
    p = values.shape[2]
    if p <= dim:
        return values
    rng = np.random.default_rng(0)
    places, signs = rng.integers(0, dim, p), rng.choice([-1, 1], p)
    fold = np.zeros((p, dim), np.float32)
    fold[np.arange(p), places] = signs
    return (values @ fold).astype(np.float32)


def damped(train: Any, queries: Any, dampings: Sequence[float], weights: Any = 1.0) -> Any:
    """phi_q (Phi^T Phi + lambda I)^-1 phi_i w_i for each lambda, `[d, q, n]`.

    It is computed from products alone, Phi_q Phi^T (Phi Phi^T + lambda I)^-1, which is the same matrix; lambda is
    a damping times the mean of the min(n, k) eigenvalues that can differ from zero.

    Args:
        train: Phi, `[n, k]`.
        queries: `[q, k]`.
        dampings: `[d]`.
        weights: of the samples, `[n]`, or 1.
    """
    values, vectors = np.linalg.eigh(train @ train.T)
    mean = values.sum() / min(train.shape)
    turned = queries @ train.T @ vectors
    return np.stack([turned / (values + damping * mean) @ vectors.T * weights for damping in dampings])
