"""The verb plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import (
    make_estimator,
    measures_of,
    open_sketches,
    own_measures,
    recommended_of,
    with_options,
)
from retrac_scale.cli.info import in_words
from retrac_scale.cli.measured import load_adapted, refuse_no_device
from retrac_scale.cli.project import RECORDED, Project, find, named, projection_of, told_entries
from retrac_scale.cli.repeated import as_json
from retrac_scale.cli.sizes import in_bytes, in_time
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.estimators import Estimator
    from retrac_scale.store import Dtype
    from retrac_scale.task.diffusion import DiffusionTask


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, help="N")
    parser.add_argument("--timesteps", type=int, help=f"T per sample (default: {Project.timesteps})")
    parser.add_argument("--checkpoints", type=int, help="C (default: 1)")
    parser.add_argument("--dim", type=int, help=f"K per timestep's sketch (default: {Project.dim})")
    parser.add_argument("--dtype", default="int8", choices=("int8", "float16", "bfloat16", "float32"))
    parser.add_argument("--model", help="diffusers folder or hub name, or 'demo': times sketching it here")
    parser.add_argument("--rank", type=int, help=f"{told_entries()['rank']} (default: {Project.rank})")
    parser.add_argument("--measure", type=named, help=f"{told_entries()['measure']} (default: {Project.measure})")
    parser.add_argument("--device", default="cpu", help="where to time (default: cpu)")
    parser.add_argument("--hours", type=float, help="deadline: says how many such workers meet it")
    parser.add_argument(
        "--repeatability",
        type=float,
        metavar="SHARE",
        help="how many timesteps it takes, told from a complete store, that two runs share so much of their top-10 "
        "lists, such as 0.9",
    )
    parser.add_argument("--store", help="with --repeatability: of these or a sample of these images")


@dataclass(frozen=True)
class _Run:
    """What is planned: sizes, projection, the estimators of its indexes, ids and columns where they are known."""

    samples: int
    timesteps: int
    checkpoints: int
    dim: int
    projection: Mapping[str, Any]
    """Its description."""
    estimators: Sequence[Estimator]
    known: Mapping[str, Any]
    measured: int = 0
    """Pairs of it that are there already."""
    measures: Sequence[str] = ("mse",)
    """Functions that are differentiated."""
    together: int = 1
    """Those of them that a training loss's index holds side by side."""


def _run(arguments: argparse.Namespace) -> Answer:
    project = find(arguments.config)
    if arguments.measure is not None:
        project = replace(project, measure=arguments.measure, stated=project.stated | {"measure"})
    if arguments.repeatability is None:
        planned, told = _described(arguments, project), Answer("", {})
    else:
        planned, told = _repeated(arguments, project)
    sizes, size_data = _sizes(planned, arguments.dtype)
    lines, data = [*told.text.splitlines(), *sizes], {**told.data, **size_data}
    model = arguments.model or (project.path(project.model) if project.model else None)
    if model is None:
        return Answer("\n".join([*lines, "time:  give --model to have it measured"]), data)
    task = _example_task(model, {} if arguments.model else project.weights, arguments.device, planned.measures)
    return _timed(planned, task, model, arguments, lines, data)


def _described(arguments: argparse.Namespace, project: Project) -> _Run:
    """The run that options and the file describe."""
    from retrac_scale import demo
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.task.items import brought

    dataset: Any = None
    often = 1 if project.timesteps == RECORDED else project.timesteps
    usual: dict[str, Any] = {"timesteps": often, "checkpoints": len(project.weights), "dim": project.dim}
    estimators, rank = project.estimators, project.rank
    if project.images:  # what the file says, where the options say nothing
        dataset = ImageFiles([project.path(project.images)], 3)
    elif arguments.model == "demo" and arguments.samples is None:
        dataset = demo.load_scans()
        usual = {"timesteps": 1, "checkpoints": len(demo.KEPT_EPOCHS), "dim": demo.DIM}
        estimators, rank = ("TracIn", "ReTrac"), 0
        project = project if "measure" in project.stated else replace(project, measure="mse")
    given = {"samples": None if dataset is None else len(dataset), **usual}
    sizes = {name: given[name] if (said := getattr(arguments, name)) is None else said for name in given}
    if min(size or 0 for size in sizes.values()) < 1:
        raise ValueError("give --samples, --timesteps, --checkpoints and --dim, each 1 or more.")
    whole = dataset is not None and len(dataset) == sizes["samples"]
    known = {name: brought(dataset, name) for name in ("ids", "columns")} if whole else {}
    projection = projection_of(rank if arguments.rank is None else arguments.rank, sizes["dim"] or 0).spec()
    made = [make_estimator(name) for name in estimators]
    if project.noise == "common":  # as `of_measure` has them
        made = [with_options(one, {"pairing": "matched"}) if one.measures else one for one in made]
    told: dict[str, Any] = {"measures": measures_of(project), "together": len(own_measures(project))}
    return _Run(**sizes, projection=projection, estimators=made, known=known, **told)


def _repeated(arguments: argparse.Namespace, project: Project) -> tuple[_Run, Answer]:
    """The run that makes the answers of a store repeat so far, and what tells it.

    Raises:
        ValueError: there is no complete store, or it was measured once.
    """
    from retrac_scale.measurement.halves import NEVER
    from retrac_scale.measurement.repeatability import repeatability
    from retrac_scale.store import open_store
    from retrac_scale.store.part import measures_in

    url = arguments.store or project.store
    try:
        store = open_store(url) if arguments.store else open_sketches(project)
    except FileNotFoundError:
        store = None
    if store is None or not store.is_complete:
        raise ValueError(
            f"how many measurements it takes is told from a complete store, and {url} is none; `retrac-scale sketch` "
            "first, or sketch a sample of the images and give it by --store."
        )
    fixed = ("timesteps", "checkpoints", "dim", "rank", "measure")
    if given := [name for name in fixed if getattr(arguments, name) is not None]:
        raise ValueError(f"--{given[0]} is what the store has; leave it out with --repeatability.")
    store, estimator = recommended_of(store)
    found, share = repeatability(store), arguments.repeatability
    needed = found.needed(share)
    if needed >= NEVER:
        raise ValueError(f"{found}; no number of measurements is foretold to reach {share:g}.")
    names = [one or "mse" for one in measures_in(store.fingerprint)]  # a store of arrays names none
    functions = len(names)
    held, t, k = store.shape[0], store.shape[1] // functions, store.shape[2]
    c, n, each = len(store.checkpoints), arguments.samples or held, store.parts[0].shape[1]
    lines = [f"repeatability: {found}"]
    if found.measurements == t:
        what, total = "timesteps", max(t, -(-needed // each) * each)
        budget = f"--until {share:g} --at-most {total}"
        lines += [f"       retrac-scale sketch {budget} adds what a project's store lacks"] if total > t else []
    else:  # each checkpoint is a measurement
        what, total = "checkpoints", max(c, needed)
    there = found.foretold(total)
    reached = f"foretold {there.value:.2f} ({there.low:.2f} to {there.high:.2f})"
    lines.insert(1, f"for {share:g}: {total} {what}, {reached}")
    alike = n == held
    planned = _Run(
        n,
        total if what == "timesteps" else t,
        total if what == "checkpoints" else c,
        k,
        store.fingerprint["projection"],
        [estimator],
        {"ids": store.ids, "columns": store.columns} if alike else {},
        measured=held * t * c if alike else 0,
        measures=names,
        together=functions,
    )
    data = {"repeatability": as_json(found), "target": share, "needed": needed, what: total, "foretold": asdict(there)}
    return planned, Answer("\n".join(lines), data)


def _sizes(planned: _Run, dtype: Dtype) -> tuple[list[str], dict[str, Any]]:
    """Bytes of the store and of the indexes, and the time of a query."""
    from retrac_scale import planner

    n, t, c, k = planned.samples, planned.timesteps, planned.checkpoints, planned.dim
    size = planner.store_size(n, t, c, k, dtype=dtype, **planned.known)
    named = "ids and columns as in the data" if planned.known else "integer ids, no columns"
    functions = len(planned.measures)
    stored = functions * size.array_bytes
    side_by_side = [1 if one.measures else planned.together for one in planned.estimators]
    parts = [t * m if one.pairing == "matched" else 1 for one, m in zip(planned.estimators, side_by_side, strict=True)]
    index = sum(
        planner.index_bytes(n, c, k, own, ridge=one.damping is not None)
        for one, own in zip(planned.estimators, parts, strict=True)
    )
    width = max(parts) * k
    print("measuring how fast rows are scanned here ...", file=sys.stderr)
    speed = planner.measure_scanning(width)
    kinds = ", ".join(f"{type(one).__name__} with {one.pairing} pairing" for one in planned.estimators)
    lines = [
        f"store: {in_bytes(stored)} in {functions * size.files:,} chunk files, {size.blocks:,} blocks"
        f"{f', of {functions} measures' if functions > 1 else ''}",
        f"       and about {in_bytes(size.metadata_bytes)} of metadata ({named}, unsharded)",
        f"index: {in_bytes(index)} (int8, {kinds})",
        f"scan:  {in_time(n * c * width / speed)} per query ({speed / 1e9:.2f} GB/s measured here, index in memory)",
    ]
    data = {
        "store_bytes": stored,
        "store_files": functions * size.files,
        "metadata_bytes": size.metadata_bytes,
        "index_bytes": index,
        "scan_seconds": n * c * width / speed,
    }
    return lines, data


def _example_task(model: str, checkpoints: Mapping[str, str], device: str, measures: Sequence[str]) -> DiffusionTask:
    """The task of a model that a run is planned for, or of the demo; it is timed alike under any scheduler."""
    from diffusers import DDPMScheduler

    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.task.measures import measure_named

    refuse_no_device(device)
    told: dict[str, Any] = {"device": device, "measure": [measure_named(one)["measure"] for one in measures]}
    if model == "demo":
        from retrac_scale.demo import build_model

        return DiffusionTask(build_model(), DDPMScheduler(num_train_timesteps=1000), **told)
    denoiser, encoder = load_adapted(model, checkpoints)
    return DiffusionTask(denoiser, DDPMScheduler(num_train_timesteps=1000), encoder=encoder, **told)


def _timed(
    planned: _Run,
    task: DiffusionTask,
    model: str,
    arguments: argparse.Namespace,
    lines: list[str],
    data: dict[str, Any],
) -> Answer:
    """With the time that sketching takes, workers for a deadline, and bytes of what the model is given encoded."""
    from retrac_scale import planner
    from retrac_scale.projections import from_spec

    projection = from_spec(planned.projection)
    item = planner.example_item(task)
    if task.encoder is not None:
        data["encoded_bytes"] = planned.samples * sum(one.nbytes for one in item.values())
        lines.insert(1, f"       and up to {in_bytes(data['encoded_bytes'])} of latents and embeddings beside it")
    print(f"measuring how fast {model} is sketched here ...", file=sys.stderr)
    pairs = planned.samples * planned.timesteps * planned.checkpoints - planned.measured
    rate = planner.measure_sketching(task, item, projection, max(1, pairs))
    seconds = rate.seconds(pairs)
    missing = ", what is there already left out" if planned.measured else ""
    missing += f", {len(planned.measures)} measures" if len(planned.measures) > 1 else ""
    lines.append(
        f"time:  {in_time(seconds)} on one worker like this ({1 / rate.pair_s:.1f} pairs/s, 1 noise draw, "
        f"{in_words(planned.projection)}{missing})"
    )
    data["sketch_seconds"] = seconds
    if arguments.hours:
        data["workers"] = planner.workers_needed(seconds, arguments.hours * 3600)
        lines.append(f"       {data['workers']} such workers for {arguments.hours} h")
    return Answer("\n".join(lines), data)


VERB = Verb(
    "plan",
    "Predict bytes, time and workers of a run.",
    """  retrac-scale plan                             the run that retrac-scale.toml describes
  retrac-scale plan --repeatability 0.9         from its store: how many timesteps answers need that repeat so far
  retrac-scale plan --samples 1000000 --timesteps 1 --checkpoints 4 --dim 4096
  retrac-scale plan --model demo                the demo's run, its columns included
  retrac-scale plan --samples 50000 --model google/ddpm-cifar10-32 --device cuda --hours 12""",
    _options,
    _run,
)
