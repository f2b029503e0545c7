"""sketch(): drives dataset -> store, one block at a time, here or on Dask workers."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from retrac_scale.calibration import fastest_batch
from retrac_scale.checkpoints import Checkpoint
from retrac_scale.gradients import ParameterFilter
from retrac_scale.preconditioning import Divisors, digest_of
from retrac_scale.projections import GradientSketcher, LowRank, Projection, from_spec
from retrac_scale.store import Dtype, Layout, SketchStore, create_store, grow_store, open_store, write_block
from retrac_scale.store.compatibility import check_compatible
from retrac_scale.store.encoding import check_dtype
from retrac_scale.store.schema import Url, check_columns, check_ids
from retrac_scale.task import DiffusionTask
from retrac_scale.timesteps import Ids, Pairs, TimestepPlan, draw_noise

if TYPE_CHECKING:
    from distributed import Client

CALIBRATION_ITEMS = 64
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-3, 0.1
FULL_CHECK_SAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class _Job:
    """All that a block is a function of; travels to workers once."""

    task: DiffusionTask
    dataset: Any
    ids: Ids
    checkpoints: Mapping[str, Checkpoint]
    timesteps: TimestepPlan
    projection: Projection
    parameters: frozenset[str]
    precondition: Mapping[str, Divisors]


def sketch(
    task: DiffusionTask,
    dataset: Any,
    out: Url,
    *,
    checkpoints: Mapping[str, Checkpoint],
    timesteps: TimestepPlan | None = None,
    projection: Projection | None = None,
    dtype: Dtype = "int8",
    batch_size: int | Literal["auto"] = "auto",
    parameters: ParameterFilter = None,
    precondition: Mapping[str, Divisors] | None = None,
    like: SketchStore | None = None,
    grow: bool = False,
    layout: Layout | None = None,
    client: Client | None = None,
    progress: bool = True,
) -> SketchStore:
    """Sketch the gradient of every (checkpoint, sample, timestep) into a SketchStore.

    Run again with the same arguments, it computes only the blocks that are missing. Everything that can be checked is
    checked before the first gradient.

    Args:
        task: what is differentiated.
        dataset: map-style; an item is a tensor, (tensor, label or dict of conditioning), or a dict with the image under
            "image", "pixel_values", ... Sample ids come from `dataset.ids`, default 0 .. n-1.
        out: path, fsspec URL, or None for memory.
        checkpoints: {name: state dict, path, or callable returning a state dict}.
        timesteps: `Recorded(path)`, `EvenlySpaced(count)` or `Explicit([...])`.
        projection: `CountSketch(dim)`, `LowRank(rank, dim)`, ...; None takes that of `like`, else `LowRank()`.
        dtype: how rows are stored, "int8", "float16" or "float32".
        batch_size: rows (pairs x noise draws) per backward pass; "auto" measures which is
            fastest in a quarter of the free memory. It stands in the store's plan, with the number of threads, and a
            resumed run or a worker obeys it.
        parameters: glob patterns or a predicate on names; None for all trainable ones, or those of `like`.
        precondition: {checkpoint: {parameter: what its gradients are divided by before they are projected}}, see
            `adam_divisors` and `fisher_divisors`. `like` does not pass it on: divide one side of a score, or both.
        like: a store that these sketches will be compared with.
        grow: add what the store at `out` lacks: samples with new ids, checkpoints, timesteps, another measure. Without
            it a call that differs from the one that began the store is refused.
        layout: how samples are cut into blocks; None chooses.
        client: a `distributed.Client` to spread the blocks over; `out` must be reachable from its workers.
        progress: show a bar with the rate in pairs per second.

    Returns:
        the complete store.

    Raises:
        ValueError: a bad item, id, timestep, checkpoint or projection, named, with what to do.
        GradientMismatchError: a pair of the first block, recomputed by plain autograd, has another gradient.
    """
    check_dtype(dtype)
    if timesteps is None:
        raise ValueError("say where to measure: timesteps=Recorded(path), EvenlySpaced(count) or Explicit([...]).")
    if not checkpoints:
        raise ValueError("sketch got no checkpoint; give checkpoints={'name': path or state dict}.")
    if like is not None:
        projection = from_spec(like.fingerprint["projection"]) if projection is None else projection
        if parameters is None:
            parameters = list(like.fingerprint["parameters"]).__contains__
    projection = LowRank() if projection is None else projection
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size must be 'auto' or 1 or more, got {batch_size}.")
    if client is not None and out is None:
        raise ValueError("workers cannot write into this process's memory; give out= a path or URL they can reach.")
    ids = check_ids(dataset_ids(dataset), len(dataset))
    columns = check_columns(getattr(dataset, "columns", None), len(ids))
    plans = {name: timesteps.pairs(name, ids, task.num_train_timesteps) for name in checkpoints}
    _check_items(task, dataset, ids)
    sketcher = GradientSketcher(task.model, projection, parameters=parameters)
    divisors = dict(precondition or {})
    if divisors and divisors.keys() != checkpoints.keys():
        raise ValueError(f"precondition is given for {sorted(divisors)}, checkpoints are {sorted(checkpoints)}.")
    for name, own in divisors.items():
        sketcher.precondition(own, f"precondition[{name!r}]")
    before = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
    try:
        digests = {name: task.load(name, checkpoint) for name, checkpoint in checkpoints.items()}
        fingerprint: dict[str, Any] = {
            "projection": projection.spec(),
            "parameters": {name: list(shape) for name, shape in sketcher.shapes.items()},
            "checkpoints": digests,
            "scheduler": scheduler_spec(task.scheduler),
            "measure": task.measure,
            "autocast": task.autocast,
            "timesteps": {**timesteps.spec(), "digest": plan_digest(plans)},
        }
        if divisors:
            fingerprint["precondition"] = {name: digest_of(own) for name, own in divisors.items()}
        if like is not None:
            check_compatible(like.fingerprint, like.checkpoints, fingerprint, list(checkpoints))

        def describe_part(some: Ids, names: Sequence[str]) -> dict[str, Any]:
            pairs = {name: timesteps.pairs(name, some, task.num_train_timesteps) for name in names}
            by_name = {key: fingerprint[key] for key in ("checkpoints", "precondition") if key in fingerprint}
            return {
                **fingerprint,
                **{key: {name: value[name] for name in names} for key, value in by_name.items()},
                "timesteps": {**timesteps.spec(), "digest": plan_digest(pairs)},
            }

        pairs = (next(iter(plans.values())).timesteps.shape[1], sketcher.dim)
        weights = {name: timesteps.weight(name) for name in checkpoints}
        plan = _recorded_plan(out)
        if plan is None:
            one = _Job(task, dataset, ids, checkpoints, timesteps, projection, frozenset(sketcher.shapes), divisors)
            rows = _fastest_batch(one, sketcher, next(iter(checkpoints))) if batch_size == "auto" else batch_size
            plan = {"batch_rows": rows, "threads": torch.get_num_threads() if client is None else 1}
        kept: dict[str, Any] = {
            "plan": plan,
            "ids": ids,
            "weights": weights,
            "dtype": dtype,
            "columns": columns,
            "layout": layout,
        }
        if grow:
            stores = grow_store(out, pairs=pairs, describe_part=describe_part, **kept)
        else:
            stores = [create_store(out, shape=(len(ids), *pairs), fingerprint=fingerprint, **kept)]
        with tqdm(total=0, unit="pair", desc="sketch", disable=not progress) as bar:
            for store in stores:
                todo = [
                    (name, i) for name in store.checkpoints for i in np.flatnonzero(~store.committed(name)).tolist()
                ]
                places = {sample: row for row, sample in enumerate(ids.tolist())}
                part = Subset(dataset, [places[sample] for sample in store.ids.tolist()])
                job = _Job(
                    task, part, store.ids, checkpoints, timesteps, projection, frozenset(sketcher.shapes), divisors
                )
                bar.total += len(store.checkpoints) * store.shape[0] * store.shape[1]
                bar.update(bar.total - bar.n - sum(_pairs_in(store, block) for _, block in todo))
                done = _run_local(job, sketcher, store, todo) if client is None else _run_on(client, job, store, todo)
                for count in done:
                    bar.update(count)
    finally:
        task.model.load_state_dict(before)
    return stores[0].refresh()


def _run_local(job: _Job, sketcher: GradientSketcher, store: SketchStore, todo: list[tuple[str, int]]) -> Iterator[int]:
    loaded = None
    for checkpoint, block in todo:
        if checkpoint != loaded:
            job.task.load(checkpoint, job.checkpoints[checkpoint])
            sketcher.precondition(job.precondition.get(checkpoint))
            loaded = checkpoint
        yield from _sketch_block(job, sketcher, store, checkpoint, block, check=(checkpoint, block) == todo[0])


def _run_on(client: Client, job: _Job, store: SketchStore, todo: list[tuple[str, int]]) -> Iterator[int]:
    from distributed import as_completed

    shared = client.scatter(job, broadcast=True)
    futures = [
        client.submit(
            _sketch_remotely, shared, store.url, store.only_part.name, checkpoint, block, number == 0, pure=False
        )  # unique keys: never a cached run
        for number, (checkpoint, block) in enumerate(todo)
    ]
    for _, pairs in as_completed(futures, with_results=True):
        yield pairs


_model_in_use = threading.Lock()


@lru_cache(maxsize=1)
def _sketcher(job: _Job) -> GradientSketcher:
    """One per worker process and run: its random signs are as large as the model."""
    return GradientSketcher(job.task.model, job.projection, parameters=job.parameters.__contains__)


def _sketch_remotely(job: _Job, url: Url, part: str, checkpoint: str, block: int, check: bool) -> int:
    store = open_store(url, mode="r+", part=part)
    with _model_in_use:
        job.task.load(checkpoint, job.checkpoints[checkpoint])
        _sketcher(job).precondition(job.precondition.get(checkpoint))
        return sum(_sketch_block(job, _sketcher(job), store, checkpoint, block, check=check))


def _sketch_block(
    job: _Job, sketcher: GradientSketcher, store: SketchStore, checkpoint: str, block: int, *, check: bool
) -> Iterator[int]:
    """Compute and commit one block as the store's plan says; yields the number of pairs of each batch as it is done.

    With `check`, the first pair is recomputed by plain autograd before anything is written.
    """
    task, samples = job.task, store.blocks[block]
    ids = job.ids[samples]
    plan = job.timesteps.pairs(checkpoint, ids, task.num_train_timesteps)
    n, t = plan.timesteps.shape
    items = [task.check_item(sample, job.dataset[samples.start + row]) for row, sample in enumerate(ids)]
    sketches = np.empty((n * t, store.shape[2]), dtype=np.float32)
    norms, losses = np.empty(n * t, dtype=np.float32), np.empty(n * t, dtype=np.float32)
    size = max(1, store.plan["batch_rows"] // plan.draws)
    for start in range(0, n * t, size):
        part = slice(start, min(start + size, n * t))

        def measured(pairs: slice = part) -> tuple[torch.Tensor, torch.Tensor]:
            return measured_pairs(task, items, ids, plan, np.arange(pairs.start, pairs.stop))

        with _threads(store.plan["threads"]):
            with sketcher:
                value, loss = measured()
                sketched, norm = sketcher(value)
            if check and start == 0:
                where = f"checkpoint {checkpoint!r}, sample {ids[0]}, timestep {plan.timesteps[0, 0]}"
                tolerance = BFLOAT16_TOLERANCE if task.autocast else FLOAT32_TOLERANCE
                sketcher.check(
                    (sketched, norm), lambda: measured()[0], lambda: measured(slice(0, 1))[0], where, tolerance
                )
        sketches[part], norms[part], losses[part] = sketched.cpu(), norm.cpu(), loss.detach().float().cpu()
        yield part.stop - part.start
    write_block(
        store,
        checkpoint,
        block,
        sketches.reshape(n, t, -1),
        norms.reshape(n, t),
        losses=losses.reshape(n, t),
        timesteps=plan.timesteps,
    )


def measured_pairs(
    task: DiffusionTask, items: list[Any], ids: Ids, plan: Pairs, pairs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values to be differentiated and losses of some pairs of a block, means over their noise draws, `[pairs]` each."""
    rows, columns = np.divmod(pairs, plan.timesteps.shape[1])
    steps, seeds = plan.timesteps[rows, columns], plan.seeds[rows, columns]
    images = torch.stack([items[row][0] for row in rows])
    noise = torch.stack(
        [draw_noise(images.shape[1:], ids[rows], steps, seeds, draw=draw) for draw in range(plan.draws)], dim=1
    )
    conditioning = {key: torch.stack([items[row][1][key] for row in rows]) for key in items[0][1]}

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(plan.draws, 0)

    values, losses = task.measured(
        repeat(images),
        repeat(torch.from_numpy(steps)),
        noise.flatten(0, 1).to(images.dtype),
        {key: repeat(value) for key, value in conditioning.items()},
    )
    return values.reshape(len(pairs), plan.draws).mean(1), losses.reshape(len(pairs), plan.draws).mean(1)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch on so many threads: rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recorded_plan(out: Url) -> dict[str, Any] | None:
    """The plan of the store at `out`, None when there is none yet."""
    try:
        plan = None if out is None else open_store(out).plan
    except (FileNotFoundError, ValueError):  # whatever else is there, creating the store names it
        return None
    return plan or None


def _fastest_batch(job: _Job, sketcher: GradientSketcher, checkpoint: str) -> int:
    ids = job.ids[:CALIBRATION_ITEMS]
    items = [job.task.check_item(sample, job.dataset[row]) for row, sample in enumerate(ids)]
    plan = job.timesteps.pairs(checkpoint, ids, job.task.num_train_timesteps)

    def run(rows: int) -> torch.Tensor:
        pairs = np.arange(max(1, rows // plan.draws)) % plan.timesteps.size
        with sketcher:
            values, _ = measured_pairs(job.task, items, ids, plan, pairs)
            sketcher(values)
        return values

    pairs = len(job.ids) * plan.timesteps.shape[1]
    return fastest_batch(run, pairs * plan.draws, job.task.device)


def dataset_ids(dataset: Any) -> Any:
    """The ids that a dataset brings, None when it brings none; ValueError unless it is map-style and not empty."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError("the dataset must be map-style: it needs __len__ and __getitem__.")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty.")
    return getattr(dataset, "ids", None)


def _check_items(task: DiffusionTask, dataset: Any, ids: Ids) -> None:
    """Check all items of a small dataset and an even sample of a large one; blocks check theirs again."""
    stride = max(1, len(ids) // FULL_CHECK_SAMPLES)
    first: tuple[int, ...] | None = None
    for row in range(0, len(ids), stride):
        image = task.read_item(ids[row], dataset[row]).sample
        first = first or tuple(image.shape)
        if tuple(image.shape) != first:
            raise ValueError(
                f"dataset item {ids[row]} has shape {tuple(image.shape)}, but item {ids[0]} has {first}; "
                "resize or crop all items to one shape in the dataset."
            )


def scheduler_spec(scheduler: Any) -> dict[str, Any]:
    """What of the scheduler determines the noisy images."""
    config = dict(scheduler.config)
    keys = (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "prediction_type",
        "rescale_betas_zero_snr",
        "shift",
        "flow_shift",
        "use_flow_sigmas",
        "use_dynamic_shifting",
    )
    return {"class": type(scheduler).__name__, **{key: config[key] for key in keys if key in config}}


def plan_digest(plans: Mapping[str, Pairs]) -> str:
    """A digest of every timestep and noise seed of some samples at some checkpoints."""
    digest = hashlib.blake2b(digest_size=16)
    for name, plan in plans.items():
        digest.update(name.encode() + plan.timesteps.tobytes() + plan.seeds.tobytes())
    return digest.hexdigest()


def _pairs_in(store: SketchStore, block: int) -> int:
    samples = store.blocks[block]
    return len(range(samples.start, samples.stop)) * store.shape[1]
