"""The verb plan."""

from __future__ import annotations

import argparse
from typing import Any

from retrac_scale.cli.project import find, projection_of
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    for name, what in (("samples", "N"), ("timesteps", "T per sample"), ("checkpoints", "C"), ("dim", "K per sketch")):
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--dtype", default="int8", choices=("int8", "float16", "bfloat16", "float32"))
    parser.add_argument("--model", help="diffusers folder or hub name, or 'demo': times sketching it here")
    parser.add_argument(
        "--rank", type=int, help="of the projection; 0 keeps the full gradient (default: -1, chosen for dim)"
    )
    parser.add_argument("--device", default="cpu", help="where to time (default: cpu)")
    parser.add_argument("--hours", type=float, help="deadline: says how many such workers meet it")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale import demo, planner
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.task.items import brought

    project = find(arguments.config)
    n, t, c = arguments.samples, arguments.timesteps, arguments.checkpoints
    k, rank, model = arguments.dim, arguments.rank, arguments.model
    dataset: Any = None
    if project.images:  # what the file says, where the options say nothing
        dataset = ImageFiles([project.path(project.images)], 3)
        n = n or len(dataset)
        t, c, k = t or project.timesteps, c or len(project.weights), k or project.dim
        model = model or project.denoiser
    elif model == "demo" and n is None:
        dataset = demo.load_scans()
        n, t, c, k = len(dataset), t or 1, c or len(demo.KEPT_EPOCHS), k or demo.DIM
        rank = 0 if rank is None else rank
    if min(n or 0, t or 0, c or 0, k or 0) < 1:
        raise ValueError("give --samples, --timesteps, --checkpoints and --dim, each 1 or more.")
    known = {name: brought(dataset, name) for name in ("ids", "columns")} if dataset and len(dataset) == n else {}
    size = planner.store_size(n, t, c, k, dtype=arguments.dtype, **known)
    named = "ids and columns as in the data" if known else "integer ids, no columns"
    index = planner.index_bytes(n, c, k)
    speed = planner.measure_scanning(k)
    lines = [
        f"store: {size.array_bytes} bytes in {size.files} chunk files, {size.blocks} blocks",
        f"       and about {size.metadata_bytes} bytes of metadata ({named}, unsharded)",
        f"index: {index} bytes (int8, cross pairing)",
        f"scan:  {n * c * k / speed:.3g} s per query ({speed / 1e9:.2f} GB/s measured here, index in memory)",
    ]
    data: dict[str, Any] = {
        "store_bytes": size.array_bytes,
        "store_files": size.files,
        "metadata_bytes": size.metadata_bytes,
        "index_bytes": index,
        "scan_seconds": n * c * k / speed,
    }
    if model is None:
        return Answer("\n".join([*lines, "time:  give --model to have it measured"]), data)
    projection = projection_of(project.rank if rank is None else rank, k)
    task, item = planner.example_task(model, arguments.device)
    rate = planner.measure_sketching(task, item, projection)
    seconds = rate.seconds(n * t * c)
    lines.append(
        f"time:  {seconds:.0f} s on one worker like this ({1 / rate.pair_s:.1f} pairs/s, 1 noise draw, {projection})"
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
  retrac-scale plan --samples 1000000 --timesteps 1 --checkpoints 4 --dim 4096
  retrac-scale plan --model demo                the demo's run, its columns included
  retrac-scale plan --samples 50000 --timesteps 10 --checkpoints 4 --dim 2048 \\
      --model google/ddpm-cifar10-32 --device cuda --hours 12""",
    _options,
    _run,
)
