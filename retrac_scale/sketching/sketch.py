"""From a dataset to a store: what is there is described, compared and continued, what is missing is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Subset

from retrac_scale.columns import check_columns, check_ids
from retrac_scale.projections import GradientSketcher
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import Task
from retrac_scale.runtime.workers import gpu_label, most_on_a_machine
from retrac_scale.sketching.blocks import fastest_there, fill
from retrac_scale.sketching.content import changed_items, look_through, refuse, stored_contents
from retrac_scale.sketching.description import describe
from retrac_scale.sketching.job import Job
from retrac_scale.sketching.request import Request, existing, settle
from retrac_scale.store import SketchStore, create_store, grow_store
from retrac_scale.store.schema import SKETCHED
from retrac_scale.task.checkpoints import borrowed_weights
from retrac_scale.task.items import brought, dataset_ids
from retrac_scale.task.timesteps import TimestepPlan
from retrac_scale.training.record import read_record
from retrac_scale.training.recorded import Recorded


def sketched(request: Request, timesteps: TimestepPlan | Sequence[TimestepPlan] | None) -> SketchStore:
    """The complete store of a request."""
    return sketched_by_plans(*settle(request, timesteps))


def sketched_by_plans(request: Request, plans: Sequence[TimestepPlan]) -> SketchStore:
    """The complete store of a settled request, measured by one plan after the other."""
    store = sketched_by(request, plans[0])
    for plan in plans[1:]:
        store = sketched_by(replace(request, grow=True, replace=False), plan)
    return store.under(*request.together) if request.together else store


def sketched_by(request: Request, timesteps: TimestepPlan) -> SketchStore:
    """The complete store of a settled request, measured by one plan."""
    task, dataset, client = request.task, request.dataset, request.client
    resources = gpu_label(client) if client is not None and task.device.type == "cuda" else None
    ids = check_ids(dataset_ids(dataset), len(dataset))
    columns = check_columns(brought(dataset, "columns"), len(ids))
    if isinstance(timesteps, Recorded):
        _check_places(timesteps, dataset)
    pairs = {name: timesteps.pairs(name, ids, task.num_train_timesteps) for name in request.checkpoints}
    steps = next(iter(pairs.values())).timesteps.shape[1]
    projection = request.projection_of(steps)
    there = existing(request.out)
    stored = None if there is None else stored_contents(there, ids)
    content, told = look_through(task, dataset, ids, stored, every=request.check_all or request.replace)
    sketcher = GradientSketcher(task.model, projection, parameters=request.parameters, check=False)  # its first pair is
    for name, own in request.precondition.items():
        sketcher.precondition(own, f"precondition[{name!r}]")
    with borrowed_weights(task.model):
        described = describe(request, timesteps, pairs, projection, sketcher)
        if request.like is not None:
            described.check_like(request.like, task.measures)
        chosen = frozenset(sketcher.shapes)
        job = Job(task, dataset, ids, content, request.checkpoints, timesteps, projection, chosen, request.precondition)
        plan = {} if there is None else there.plan
        if not plan:
            plan = {**_measured_plan(request, job, sketcher, resources), **told}
        kept: dict[str, Any] = {
            "plan": plan,
            "ids": ids,
            "weights": {name: timesteps.weight(name) for name in request.checkpoints},
            "dtype": request.dtype,
            "quantities": SKETCHED,
            "columns": columns,
            "layout": request.layout,
        }
        shape, whole = (len(ids), steps, sketcher.dim), described.fingerprint
        parts = [] if request.grow else [create_store(request.out, shape=shape, fingerprint=whole, **kept)]
        changed = [] if stored is None else changed_items(task, dataset, ids, content, stored)
        if changed and not request.replace:
            refuse(request.out, "sketch them anew with replace=True (--replace)", changed, content)
        for measure in task.measures if request.grow else task.measures[1:]:
            described_part = partial(described.part, measure)
            parts += grow_store(request.out, pairs=shape[1:], describe_part=described_part, **kept)
        if changed:
            parts[0].set_aside(changed)
        fill(parts, job, sketcher, client, resources, request.progress)
    return parts[0].refresh()


def _check_places(timesteps: Recorded, dataset: Any) -> None:
    """Raise ValueError where a part of a data set does not tell which samples of the record it holds."""
    if isinstance(dataset, Subset) and brought(dataset, "ids") is None:
        record = read_record(timesteps.path)
        if record is not None and record.n_samples != len(dataset):
            raise ValueError(
                f"the dataset is a Subset of {len(dataset)} samples without ids and the record is of "
                f"{record.n_samples}, so their places in it are unknown; give the whole dataset an attribute ids."
            )


def _measured_plan(
    request: Request, job: Job, sketcher: GradientSketcher, resources: Mapping[str, float] | None
) -> dict[str, int]:
    """Rows per backward pass and threads: as asked for, or the fastest."""
    if request.batch_size != "auto":
        return {"batch_rows": request.batch_size, "threads": torch.get_num_threads() if request.client is None else 1}
    first = next(iter(job.checkpoints))
    if request.client is None:
        like = {} if request.like is None else request.like.plan  # which has no batch where no model was differentiated
        rows, threads = job.fastest(sketcher, first, like if "batch_rows" in like else None)
        return {"batch_rows": rows, "threads": threads}
    sharing = most_on_a_machine(request.client) if request.task.device.type == "cpu" else 1
    once = [Task("sketch-batch-size", (first, sharing))]
    ((_, (rows, _)),) = run(fastest_there, once, request.client, shared=job, resources=resources)
    return {"batch_rows": rows, "threads": 1}
