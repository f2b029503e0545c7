"""sketch(): drives dataset -> store, one block at a time, here or on Dask workers."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from retrac_scale.calibration import fastest_batch
from retrac_scale.execution import Task, gpu_label, run
from retrac_scale.gradients import ParameterFilter
from retrac_scale.preconditioning import Divisors, digest_of
from retrac_scale.projections import GradientMismatchError, GradientSketcher, LowRank, Projection, from_spec
from retrac_scale.store import Dtype, Layout, SketchStore, create_store, grow_store, open_store, write_block
from retrac_scale.store.compatibility import check_compatible
from retrac_scale.store.encoding import check_dtype
from retrac_scale.store.schema import Url, check_columns, check_ids
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.timesteps import Ids, Pairs, TimestepPlan, draw_noise

if TYPE_CHECKING:
    from distributed import Client

CALIBRATION_ITEMS = 64
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-3, 0.1
FULL_CHECK_SAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class _Job:
    """All that a block is a function of; travels to a worker once."""

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
        GradientMismatchError: the first pair of a process, recomputed by plain autograd, has another gradient.
        FailedTasksError: some blocks failed; all others are committed, and the same call computes those that are not.
        ConnectionError: the scheduler is gone; what is committed stands.
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
    resources = gpu_label(client) if client is not None and task.device.type == "cuda" else None
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
        frozen = {**task.frozen, **getattr(dataset, "frozen", {})}
        if frozen:
            fingerprint["frozen"] = frozen
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
            rows = batch_size
            if rows == "auto":
                one = _Job(task, dataset, ids, checkpoints, timesteps, projection, frozenset(sketcher.shapes), divisors)
                first = next(iter(checkpoints))
                if client is None:
                    rows = _fastest_batch(one, sketcher, first)
                else:
                    measure = [Task("sketch-batch-size", (first,))]
                    ((_, rows),) = run(_fastest_batch_there, measure, client, shared=one, resources=resources)
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
                blocks = (_block_task(store, *block) for block in todo)
                if client is None:
                    share = _Share(job, store, sketcher, advance=bar.update)
                    for _ in run(_Share.sketch, blocks, shared=share, threads=1, fatal=(GradientMismatchError,)):
                        pass
                else:
                    there = run(
                        _sketch_there,
                        blocks,
                        client,
                        shared=(job, str(store.url), store.only_part.name),
                        resources=resources,
                        fatal=(GradientMismatchError,),
                    )
                    for _, pairs in there:
                        bar.update(pairs)
    finally:
        task.model.load_state_dict(before)
    return stores[0].refresh()


def _block_task(store: SketchStore, checkpoint: str, block: int) -> Task:
    samples = store.blocks[block]
    return Task(f"sketch-{checkpoint}-samples-{samples.start}-{samples.stop}", (checkpoint, block))


class _Share:
    """One process's share of a job: the model at one checkpoint, and a sketcher whose first pair is checked."""

    def __init__(
        self, job: _Job, store: SketchStore, sketcher: GradientSketcher, advance: Callable[[int], Any]
    ) -> None:
        self._job, self._store, self._sketcher, self._advance = job, store, sketcher, advance
        self._loaded: str | None = None
        self._checked = False

    def sketch(self, checkpoint: str, block: int) -> int:
        """Compute and commit one block as the store's plan says; returns its number of pairs.

        Of the first block, the first pair is recomputed by plain autograd before anything is written.
        """
        job, task, store = self._job, self._job.task, self._store
        if checkpoint != self._loaded:
            digest = task.load(checkpoint, job.checkpoints[checkpoint])
            if digest != store.fingerprint["checkpoints"][checkpoint]:
                raise ValueError(
                    f"checkpoint {checkpoint!r} has other weights on {platform.node()} than where sketch(...) was "
                    "called; give a state dict, or the same file on all machines."
                )
            self._sketcher.precondition(job.precondition.get(checkpoint))
            self._loaded = checkpoint
        samples = store.blocks[block]
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
                with self._sketcher as sketcher:
                    value, loss = measured()
                    sketched, norm = sketcher(value)
                if not self._checked:
                    where = f"checkpoint {checkpoint!r}, sample {ids[0]}, timestep {plan.timesteps[0, 0]}"
                    tolerance = BFLOAT16_TOLERANCE if task.autocast else FLOAT32_TOLERANCE
                    sketcher.check(
                        (sketched, norm), lambda: measured()[0], lambda: measured(slice(0, 1))[0], where, tolerance
                    )
                    self._checked = True
            sketches[part], norms[part], losses[part] = sketched.cpu(), norm.cpu(), loss.detach().float().cpu()
            self._advance(part.stop - part.start)
        write_block(
            store,
            checkpoint,
            block,
            sketches.reshape(n, t, -1),
            norms.reshape(n, t),
            losses=losses.reshape(n, t),
            timesteps=plan.timesteps,
        )
        return int(n * t)


_model_in_use = threading.Lock()


@lru_cache(maxsize=1)
def _share(job: _Job, url: str, part: str) -> _Share:
    """One per worker process and run: the random signs are as large as the model."""
    store = open_store(url, mode="r+", part=part)
    return _Share(job, store, _new_sketcher(job), advance=lambda pairs: None)


def _new_sketcher(job: _Job) -> GradientSketcher:
    return GradientSketcher(job.task.model, job.projection, parameters=job.parameters.__contains__)


def _sketch_there(shared: tuple[_Job, str, str], checkpoint: str, block: int) -> int:
    with _model_in_use:
        job, url, part = shared
        return _share(job, url, part).sketch(checkpoint, block)


def _fastest_batch_there(job: _Job, checkpoint: str) -> int:
    with _model_in_use, _threads(1):
        return _fastest_batch(job, _new_sketcher(job), checkpoint)


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
    for row in rows:
        if items[row][1].keys() != items[0][1].keys():
            raise ValueError(
                f"sample {ids[row]} brings {sorted(items[row][1])} and sample {ids[0]} {sorted(items[0][1])}; "
                "give all samples the same conditioning."
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
        "trained_betas",
        "snr_shift_scale",
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
