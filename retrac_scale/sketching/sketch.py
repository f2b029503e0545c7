"""sketch(): drives dataset -> store, one block at a time, here or on Dask workers."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm
from zarr.storage import MemoryStore

from retrac_scale.api.until import check_until, grown_until
from retrac_scale.arrays import Ids
from retrac_scale.columns import check_columns, check_ids
from retrac_scale.gradients import ParameterFilter
from retrac_scale.native.memory import keep_freed_pages
from retrac_scale.projections import GradientMismatchError, GradientSketcher, LowRank, Projection, from_spec
from retrac_scale.projections.preconditioning import Divisors, digest_of
from retrac_scale.runtime.execution import Task, gpu_label, run
from retrac_scale.sketching.calibration import fastest, torch_threads
from retrac_scale.sketching.content import (
    ITEM,
    ChangedItemsError,
    changed_items,
    look_through,
    read_again,
    refuse,
    stored_contents,
)
from retrac_scale.sketching.pairs import Items, measured_pairs, without_autocast
from retrac_scale.sketching.plans import plans_of_call
from retrac_scale.store import Dtype, Layout, SketchStore, create_store, grow_store, open_store, write_block
from retrac_scale.store.compatibility import check_compatible, warn_of_versions
from retrac_scale.store.encoding import check_dtype, decode
from retrac_scale.store.reader import Words
from retrac_scale.store.schema import CONTENT, SKETCHED, Url, whereabouts
from retrac_scale.task.checkpoints import Checkpoint, absolute
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import brought, dataset_ids
from retrac_scale.task.noising import scheduler_spec
from retrac_scale.task.timesteps import Grid, Pairs, TimestepPlan, further, plan_digest
from retrac_scale.training.record import read_record
from retrac_scale.training.recorded import Recorded

if TYPE_CHECKING:
    from distributed import Client

FATAL = (GradientMismatchError, ChangedItemsError)
CALIBRATION_ITEMS = 64
CHECKED_PAIRS = 2
ROW_ENTRIES, LEAST_DIM = 2048, 512
"""Entries of all timesteps of a sample and checkpoint together, and at least of each, where no projection is given."""


@dataclass(frozen=True, eq=False)
class _Job:
    """All that a block is a function of; travels to a worker once."""

    task: DiffusionTask
    dataset: Any
    ids: Ids
    content: Words
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
    timesteps: TimestepPlan | Sequence[TimestepPlan] | None = None,
    projection: Projection | None = None,
    dtype: Dtype = "int8",
    batch_size: int | Literal["auto"] = "auto",
    parameters: ParameterFilter = None,
    precondition: Mapping[str, Divisors] | None = None,
    like: SketchStore | None = None,
    grow: bool = False,
    replace: bool = False,
    check_all: bool = False,
    until: float | None = None,
    at_most: int = 32,
    layout: Layout | None = None,
    client: Client | None = None,
    progress: bool = True,
) -> SketchStore:
    """Sketch the gradient of every (checkpoint, sample, timestep) into a SketchStore.

    Run again with the same arguments, it computes only the blocks that are missing. Everything that can be checked is
    checked before the first gradient.

    Several measures of a task share each forward pass; each makes a store of its own under the same path, as if it had
    been sketched alone with the same `batch_size`.

    On Linux the process keeps up to 2 GiB of freed memory from then on, see `memory.keep_freed_pages`.

    Args:
        task: what is differentiated.
        dataset: map-style; an item is a tensor, (tensor, label or dict of conditioning), or a dict with the image under
            "image", "pixel_values", ... Sample ids come from `dataset.ids`, default 0 .. n-1.
        out: path, fsspec URL, or None for memory, which holds one measure, that of `like` if the task has several.
        checkpoints: {name: state dict, path, or callable returning a state dict}.
        timesteps: `EvenlySpaced(count)`, `Explicit([...])`, `Recorded(path)`, or several of them. None takes those of
            the store at `out`, or of `like`, which makes queries see the noise that the training samples saw; where
            there is neither, four timesteps under common noise.
        projection: `CountSketch(dim)`, `LowRank(rank, dim)`, ...; None takes that of `like` or of the store at `out`,
            else `LowRank` with 2048 entries for all timesteps of a sample together, but at least 512 for each.
        dtype: how rows are stored, "int8", "float16" or "float32".
        batch_size: rows (pairs x noise draws) per backward pass; "auto" measures which is fastest in a quarter of the
            free memory, and whether one thread of torch is faster than all, as on a busy machine. Both stand in the
            store's plan, and a resumed run or a worker obeys it.
        parameters: glob patterns or a predicate on names; None for all trainable ones, or those of `like`.
        precondition: {checkpoint: {parameter: what its gradients are divided by before they are projected}}, see
            `adam_divisors` and `fisher_divisors`. `like` does not pass it on: divide one side of a score, or both.
        like: a store that these sketches will be compared with. Where that was measured under common noise, a grid of
            timesteps takes its seed; where noise is own, it has other noise than the store's, unless a seed is given.
        grow: add what the store at `out` lacks: samples with new ids, checkpoints, timesteps, another first measure.
            Without it a call that differs from the one that began the store is refused.
        replace: sketch items anew that are others than those that the store at `out` was made of; without it they are
            refused. What else was sketched of them, under other measures, timesteps and checkpoints, is taken back.
        check_all: compare all items with those that were sketched. It is done anyway for up to 10,000 samples and with
            `replace`; of more, an even sample is compared, and those whose file has another size or time.
        until: measure all samples again at further timesteps, until the overlap of the top-10 lists of two such runs is
            foretold to be so much (`repeatability`, of the recommended estimator), or `at_most` is spent.
        at_most: timesteps of a sample in all, with `until`.
        layout: how samples are cut into blocks; None chooses.
        client: a `distributed.Client` to spread the blocks over; `out` must be reachable from its workers.
        progress: show a bar with the rate in pairs per second.

    Returns:
        the complete store, of the task's first measure; `open_store(out, measure=...)` opens the others.

    Raises:
        ValueError: a bad item, id, timestep, checkpoint or projection, named, with what to do.
        ChangedItemsError: items are others than those that the store was made of, or differ between two readings.
        GradientMismatchError: the first pair of a process, recomputed by plain autograd, has another gradient.
        FailedTasksError: some blocks failed; all others are committed, and the same call computes those that are not.
        ConnectionError: the scheduler is gone; what is committed stands.
    """
    check_dtype(dtype)
    there = _existing(out)
    for known in (like, there):
        if known is not None:
            warn_of_versions(known)
    plans = plans_of_call(timesteps, like, there)
    if not checkpoints or not isinstance(checkpoints, Mapping):
        raise ValueError(f"sketch needs checkpoints={{'name': path or state dict}}, got {checkpoints!r}.")
    checkpoints = absolute(checkpoints)
    if until is not None:
        check_until(until, at_most, plans, out, like)
    if projection is None and (like or there) is not None:
        projection = from_spec((like or there).fingerprint["projection"])  # type: ignore[union-attr]
    if client is not None and out is None:
        raise ValueError("workers cannot write into this process's memory; give out= a path or URL they can reach.")
    if like is not None:
        if parameters is None:
            parameters = list(like.fingerprint["parameters"]).__contains__
        if out is None and like.fingerprint.get("measure") in task.measures:
            task = task.only(like.fingerprint["measure"])
    if out is None and len(task.measures) > 1:
        raise ValueError(f"memory holds one measure, the task has {len(task.measures)}; give out= a path.")
    if grow and out is None:
        raise ValueError("grow=True adds to a store that is there; give out= its path or URL.")
    place: Any = MemoryStore() if out is None and len(plans) > 1 else out

    def measured(plan: TimestepPlan, grow: bool, replace: bool = False) -> SketchStore:
        return _sketch_by_one_plan(
            task,
            dataset,
            place,
            checkpoints=checkpoints,
            timesteps=plan,
            projection=projection,
            dtype=dtype,
            batch_size=batch_size,
            parameters=parameters,
            precondition=precondition,
            like=like,
            grow=grow,
            replace=replace,
            check_all=check_all,
            layout=layout,
            client=client,
            progress=progress,
        )

    store = measured(plans[0], grow, replace)
    for plan in plans[1:]:
        store = measured(plan, True)
    if until is None:
        return store
    assert isinstance(plans[0], Grid)
    again = partial(further, plans[0], num_train_timesteps=task.num_train_timesteps)
    return grown_until(store, until, at_most, again, partial(measured, grow=True))


def _sketch_by_one_plan(
    task: DiffusionTask,
    dataset: Any,
    out: Url,
    *,
    checkpoints: Mapping[str, Checkpoint],
    timesteps: TimestepPlan,
    projection: Projection | None,
    dtype: Dtype,
    batch_size: int | Literal["auto"],
    parameters: ParameterFilter,
    precondition: Mapping[str, Divisors] | None,
    like: SketchStore | None,
    grow: bool,
    replace: bool,
    check_all: bool,
    layout: Layout | None,
    client: Client | None,
    progress: bool,
) -> SketchStore:
    """See `sketch`; with one timestep plan."""
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size must be 'auto' or an integer of 1 or more, got {batch_size!r}.")
    resources = gpu_label(client) if client is not None and task.device.type == "cuda" else None
    ids = check_ids(dataset_ids(dataset), len(dataset))
    columns = check_columns(brought(dataset, "columns"), len(ids))
    if isinstance(timesteps, Recorded) and isinstance(dataset, Subset) and brought(dataset, "ids") is None:
        record = read_record(timesteps.path)
        if record is not None and record.n_samples != len(dataset):
            raise ValueError(
                f"the dataset is a Subset of {len(dataset)} samples without ids and the record is of "
                f"{record.n_samples}, so their places in it are unknown; give the whole dataset an attribute ids."
            )
    plans = {name: timesteps.pairs(name, ids, task.num_train_timesteps) for name in checkpoints}
    steps = next(iter(plans.values())).timesteps.shape[1]
    projection = LowRank(dim=max(LEAST_DIM, ROW_ENTRIES // steps)) if projection is None else projection
    if not isinstance(projection, Projection):
        raise ValueError(f"projection must be one, such as CountSketch(4096), got {projection!r}.")
    begun = _existing(out)
    stored = None if begun is None else stored_contents(begun, ids)
    content, told = look_through(task, dataset, ids, stored, every=check_all or replace)
    sketcher = GradientSketcher(task.model, projection, parameters=parameters, check=False)  # its first pair is
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
            "forward": task.forward,
            "autocast": task.autocast,
            "timesteps": {**timesteps.spec(), "digest": plan_digest(plans)},
        }
        frozen = {**task.frozen, **(brought(dataset, "frozen") or {})}
        if frozen:
            fingerprint["frozen"] = frozen
        if divisors:
            fingerprint["precondition"] = {name: digest_of(own) for name, own in divisors.items()}
        if like is not None:
            held = like.measurements
            for measure in task.measures:
                there = {**like.fingerprint, **({"measure": measure} if measure in held else {})}
                check_compatible(there, like.checkpoints, {**fingerprint, "measure": measure}, list(checkpoints))

        def describe_part(measure: str, some: Ids, names: Sequence[str]) -> dict[str, Any]:
            pairs = {name: timesteps.pairs(name, some, task.num_train_timesteps) for name in names}
            by_name = {key: fingerprint[key] for key in ("checkpoints", "precondition") if key in fingerprint}
            return {
                **fingerprint,
                **{key: {name: value[name] for name in names} for key, value in by_name.items()},
                "measure": measure,
                "timesteps": {**timesteps.spec(), "digest": plan_digest(pairs)},
            }

        pairs = (steps, sketcher.dim)
        weights = {name: timesteps.weight(name) for name in checkpoints}
        job = _Job(
            task, dataset, ids, content, checkpoints, timesteps, projection, frozenset(sketcher.shapes), divisors
        )
        plan = {} if begun is None else begun.plan
        if not plan:
            rows, threads = batch_size, torch.get_num_threads() if client is None else 1
            if rows == "auto":
                first = next(iter(checkpoints))
                if client is None:
                    rows, threads = _fastest(job, sketcher, first)
                else:
                    once = [Task("sketch-batch-size", (first,))]
                    ((_, (rows, _)),) = run(_fastest_there, once, client, shared=job, resources=resources)
            plan = {"batch_rows": rows, "threads": threads, **told}
        kept: dict[str, Any] = {
            "plan": plan,
            "ids": ids,
            "weights": weights,
            "dtype": dtype,
            "quantities": SKETCHED,
            "columns": columns,
            "layout": layout,
        }
        parts = [] if grow else [create_store(out, shape=(len(ids), *pairs), fingerprint=fingerprint, **kept)]
        changed = [] if stored is None else changed_items(task, dataset, ids, content, stored)
        if changed and not replace:
            refuse(out, "sketch them anew with replace=True (--replace)", changed, content)
        for measure in task.measures if grow else task.measures[1:]:
            parts += grow_store(out, pairs=pairs, describe_part=partial(describe_part, measure), **kept)
        if changed:
            parts[0].set_aside(changed)
        _fill(parts, job, sketcher, client, resources, progress)
    finally:
        task.model.load_state_dict(before)
    return parts[0].refresh()


def _fill(
    parts: Sequence[SketchStore],
    job: _Job,
    sketcher: GradientSketcher,
    client: Client | None,
    resources: Mapping[str, float] | None,
    progress: bool,
) -> None:
    """Compute what parts lack, those over the same samples together."""
    together: dict[str, list[SketchStore]] = {}
    for store in parts:
        together.setdefault(store.only_part.same_samples, []).append(store)
    rows = {sample: row for row, sample in enumerate(job.ids.tolist())}
    with tqdm(total=0, unit="pair", desc="sketch", disable=not progress) as bar:
        for stores in together.values():
            ids, todo = stores[0].ids, _missing(stores)
            chosen = [rows[sample] for sample in ids.tolist()]
            own = replace(job, dataset=Subset(job.dataset, chosen), ids=ids, content=job.content[chosen])
            bar.total += sum(len(store.checkpoints) * store.shape[0] * store.shape[1] for store in stores)
            bar.update(bar.total - bar.n - sum(_pairs_in(stores[0], i) * len(x) for (_, i), x in todo.items()))
            blocks = (_block_task(stores[0], *place, lacking) for place, lacking in todo.items())
            if client is None:
                share = _Share(own, stores, sketcher, advance=bar.update)
                for _ in run(_Share.sketch, blocks, shared=share, threads=1, fatal=FATAL):
                    pass
            else:
                there = run(
                    _sketch_there,
                    blocks,
                    client,
                    shared=(own, whereabouts(str(stores[0].url)), tuple(store.only_part.name for store in stores)),
                    resources=resources,
                    fatal=FATAL,
                )
                for _, pairs in there:
                    bar.update(pairs)


def _missing(stores: Sequence[SketchStore]) -> dict[tuple[str, int], list[str]]:
    """Checkpoint and block -> the parts over the same samples that lack it, one for each measure."""
    lacking: dict[tuple[str, int], list[str]] = {}
    for store in stores:
        for name in store.checkpoints:
            for block in np.flatnonzero(~store.committed(name)).tolist():
                lacking.setdefault((name, block), []).append(store.only_part.name)
    return lacking


def _block_task(store: SketchStore, checkpoint: str, block: int, parts: Sequence[str]) -> Task:
    samples = store.blocks[block]
    return Task(f"sketch-{checkpoint}-samples-{samples.start}-{samples.stop}", (checkpoint, block, parts))


class _Share:
    """One process's share of a job: the model at one checkpoint, and a sketcher whose first pair is checked."""

    def __init__(
        self, job: _Job, stores: Sequence[SketchStore], sketcher: GradientSketcher, advance: Callable[[int], Any]
    ) -> None:
        self._job, self._sketcher, self._advance = job, sketcher, advance
        self._stores = {store.only_part.name: store for store in stores}
        self._loaded: str | None = None
        self._checked: set[str] = set()

    def pairs_if_committed(self, checkpoint: str, block: int, parts: Sequence[str]) -> int | None:
        """The pairs of a block that is committed to all of the parts, else None."""
        stores = [self._stores[name] for name in parts]
        if any(store.only_part.record(checkpoint, block) is None for store in stores):
            return None
        return sum(_pairs_in(store, block) for store in stores)

    def sketch(self, checkpoint: str, block: int, parts: Sequence[str]) -> int:
        """Compute one block as the store's plan says and commit it to parts, one for each measure; returns its pairs.

        Of the first block, the first pair is recomputed by plain autograd before anything is written.
        """
        job, stores = self._job, [self._stores[name] for name in parts]
        store, measures = stores[0], [store.fingerprint["measure"] for store in stores]
        task = job.task.only(*measures)
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
        items: dict[int, Any] = {}
        contents = job.content[samples].copy()
        sketches = np.empty((len(stores), n * t, store.shape[2]), dtype=np.float32)
        norms, losses = np.empty((2, len(stores), n * t), dtype=np.float32)
        same = _take_over(stores, checkpoint, block, contents, sketches, norms, losses)
        todo = np.flatnonzero(~np.repeat(same, t))
        size = max(1, store.plan["batch_rows"] // plan.draws)
        self._advance((n * t - len(todo)) * len(stores))
        for start in range(0, len(todo), size):
            pairs = todo[start : start + size]
            # of a block only one batch is held, beside the sample that all others must be like
            wanted = {0, *(pairs // t).tolist()}
            items = {row: item for row, item in items.items() if row in wanted}
            for row in wanted - items.keys():
                items[row], contents[row] = _read(job, samples.start + row)
            with torch_threads(store.plan["threads"]):
                found = _sketched(self._sketcher, task, items, ids, plan, pairs)
                for measure, (sketched, norm, _) in zip(measures, found, strict=True):
                    if measure not in self._checked:
                        row, step = divmod(int(pairs[0]), t)
                        where = f"checkpoint {checkpoint!r}, sample {ids[row]}, timestep {plan.timesteps[row, step]}"
                        one = task.only(measure)
                        alone = partial(_values, one, items, ids, plan, pairs[:1])
                        few = partial(_values, *without_autocast(one, items), ids, plan, pairs[:CHECKED_PAIRS])
                        _check(self._sketcher, one, (sketched, norm), few, alone, where)
                        self._checked.add(measure)
            for row, (sketched, norm, loss) in enumerate(found):
                sketches[row, pairs], norms[row, pairs], losses[row, pairs] = sketched.cpu(), norm.cpu(), loss.cpu()
            self._advance(len(pairs) * len(stores))
        for row, store in enumerate(stores):
            write_block(
                store,
                checkpoint,
                block,
                sketches[row].reshape(n, t, -1),
                norms[row].reshape(n, t),
                losses=losses[row].reshape(n, t),
                timesteps=plan.timesteps,
                contents=contents,
            )
            store.only_part.forget_aside(checkpoint, block)
        return int(n * t) * len(stores)


def _take_over(
    stores: Sequence[SketchStore], checkpoint: str, block: int, contents: Words, sketches: Any, norms: Any, losses: Any
) -> npt.NDArray[np.bool_]:
    """Which samples of a block that was set aside are the same, bool `[n]`; fills in what was sketched of them."""
    asides = [store.only_part.aside(checkpoint, block) for store in stores]
    same = np.ones(len(contents), bool)
    for row, aside in enumerate(asides):
        if aside is None or CONTENT not in aside:
            return np.zeros(len(contents), bool)
        same &= aside[CONTENT][:, ITEM] == contents[:, ITEM]
        sketches[row] = decode(aside["sketch"], aside["scale"]).reshape(sketches[row].shape)
        norms[row], losses[row] = aside["norm"].reshape(-1), aside["loss"].reshape(-1)
    return same


_model_in_use = threading.Lock()


@lru_cache(maxsize=1)
def _share(job: _Job, url: str, parts: tuple[str, ...]) -> _Share:
    """One per worker process and run: the random signs are as large as the model."""
    stores = [open_store(url, mode="r+", part=part) for part in parts]
    return _Share(job, stores, _new_sketcher(job), advance=lambda pairs: None)


def _new_sketcher(job: _Job) -> GradientSketcher:
    return GradientSketcher(job.task.model, job.projection, parameters=job.parameters.__contains__, check=False)


def _sketch_there(
    shared: tuple[_Job, str, tuple[str, ...]], checkpoint: str, block: int, lacking: Sequence[str]
) -> int:
    with _model_in_use:
        job, url, parts = shared
        share = _share(job, url, parts)
        # a task runs again when the worker that holds its result dies: what it committed stands
        return share.pairs_if_committed(checkpoint, block, lacking) or share.sketch(checkpoint, block, lacking)


def _fastest_there(job: _Job, checkpoint: str) -> tuple[int, int]:
    with _model_in_use, torch_threads(1):
        return _fastest(job, _new_sketcher(job), checkpoint)


def _sketched(
    sketcher: GradientSketcher, task: DiffusionTask, items: Items, ids: Ids, plan: Pairs, pairs: Any
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each measure sketches `[pairs, k]`, norms, losses `[pairs]`: one forward pass, a backward pass for each."""
    keep_freed_pages()
    with sketcher:
        measured = measured_pairs(task, items, ids, plan, pairs)
        last = len(measured) - 1
        return [
            (*sketcher(values, retain_graph=number < last), losses.detach().float())
            for number, (values, losses) in enumerate(measured)
        ]


def _check(sketcher: GradientSketcher, task: DiffusionTask, *given: Any) -> None:
    """In full precision, unless torch cannot differentiate the model there: kernels differ in what they allow."""
    try:
        with task.in_full_precision():
            sketcher.check(*given)
    except GradientMismatchError:
        raise
    except RuntimeError:
        sketcher.check(*given)


def _values(task: DiffusionTask, items: Items, ids: Ids, plan: Pairs, pairs: Any) -> torch.Tensor:
    return measured_pairs(task, items, ids, plan, pairs)[0][0]


def _existing(out: Url) -> SketchStore | None:
    """The store at `out`, None when there is none yet."""
    try:
        return None if out is None else open_store(out)
    except (FileNotFoundError, ValueError):  # whatever else is there, creating the store names it
        return None


def _fastest(job: _Job, sketcher: GradientSketcher, checkpoint: str) -> tuple[int, int]:
    """Rows per backward pass, and threads."""
    ids = job.ids[:CALIBRATION_ITEMS]
    items = [_read(job, row)[0] for row in range(len(ids))]
    plan = job.timesteps.pairs(checkpoint, ids, job.task.num_train_timesteps)

    def run(rows: int) -> torch.Tensor:
        pairs = np.arange(max(1, rows // plan.draws)) % plan.timesteps.size
        return _sketched(sketcher, job.task, items, ids, plan, pairs)[0][2]

    pairs = len(job.ids) * plan.timesteps.shape[1]
    return fastest(run, pairs * plan.draws, job.task.device)


def _read(job: _Job, row: int) -> tuple[Any, Words]:
    """What the model takes of an item, and its words."""
    item, words = read_again(job.task, job.ids[row], job.dataset[row], job.content[row])
    return job.task.encoded(item), words


def _pairs_in(store: SketchStore, block: int) -> int:
    samples = store.blocks[block]
    return len(range(samples.start, samples.stop)) * store.shape[1]
