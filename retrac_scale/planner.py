"""What a run will cost before it is begun: bytes, time, workers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrac_scale.api.index import build_index
from retrac_scale.api.sketch import sketch
from retrac_scale.columns import check_columns, check_ids, column_types
from retrac_scale.estimators import ReTrac
from retrac_scale.estimators.ridge import BY_QUERIES
from retrac_scale.index.build import chunk_samples
from retrac_scale.projections import GradientSketcher, Projection
from retrac_scale.sketching.calibration import LARGEST, torch_threads
from retrac_scale.sketching.content import look_through
from retrac_scale.sketching.job import Job
from retrac_scale.store import Dtype, Layout, write_store
from retrac_scale.store.encoding import array_dtype
from retrac_scale.store.mapping import CRC_BYTES
from retrac_scale.store.part import lay_out
from retrac_scale.store.schema import CONTENT_WORDS, LIST_CHUNK, SKETCHED, Url, choose_layout
from retrac_scale.store.writer import describe
from retrac_scale.task.checkpoints import borrowed_weights
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import LATENTS
from retrac_scale.task.timesteps import EvenlySpaced

CALIBRATION_SECONDS, CALIBRATION_RUNS = 2.0, 3
MOST_BATCHES = 4
"""Timed beyond the first, in a run."""
SCAN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Size:
    """Of a store or an index.

    Attributes:
        array_bytes: of all chunks, to the byte.
        files: how many chunks there are.
        metadata_bytes: of all zarr.json files; to the byte for up to 2^20 samples when weights, fingerprint and plan
            are those of the run, else about.
        blocks: units of work, checkpoint x samples.
    """

    array_bytes: int
    files: int
    metadata_bytes: int
    blocks: int


def store_size(
    samples: int,
    timesteps: int,
    checkpoints: int,
    dim: int,
    *,
    dtype: Dtype = "int8",
    layout: Layout | None = None,
    weights: Mapping[str, float] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    ids: Sequence[Any] | npt.NDArray[Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    out: Url = "",
) -> Size:
    """The size of a complete store that `sketch` writes.

    Args:
        samples: n.
        timesteps: t, per sample and checkpoint.
        checkpoints: c.
        dim: k.
        dtype: how rows are stored.
        layout: None chooses, as `sketch` does.
        weights: w_c by checkpoint name, where they are known.
        fingerprint: of the run, where it is known.
        plan: of the run, where it is known.
        ids: `[n]`, None for integers.
        columns: `{name: [n]}` that come with the samples.
        out: where it will be; object stores are laid out otherwise. Sharded blocks have an index besides, not counted.
    """
    item = np.dtype(array_dtype(dtype)).itemsize
    layout = layout or choose_layout(out, samples, timesteps * dim * item)
    # sketch; scale, norm, loss; timestep; content
    per_block = [timesteps * dim * item, *[timesteps * 4] * 3, timesteps * 8, CONTENT_WORDS * 8]
    blocks = checkpoints * -(-samples // layout.block_samples)
    block_bytes = sum(layout.block_samples * row + CRC_BYTES for row in per_block)
    commit_bytes = 4 * (1 + len(per_block)) + CRC_BYTES
    weights = weights or {f"checkpoint-{i}": 1.0 for i in range(checkpoints)}
    whole = ids is not None or bool(columns)  # else one chunk of the lists stands for all
    given = check_ids(ids, samples if whole else min(samples, LIST_CHUNK))
    checked = check_columns(columns, samples)
    shape, types = (len(given), timesteps, dim), column_types(given, checked)
    meta = describe(out, shape, weights, fingerprint or {}, dtype, SKETCHED, types, plan, layout)
    laid_out = lay_out(meta, given, checked)
    lists = [len(value) for key, value in laid_out.items() if not key.endswith("zarr.json")]
    if not whole:
        lists *= -(-samples // LIST_CHUNK)  # the last chunk is as long as the others
    return Size(
        array_bytes=blocks * (block_bytes + commit_bytes) + sum(lists),
        files=blocks * (len(per_block) + 1) + len(lists),
        metadata_bytes=sum(len(value) for key, value in laid_out.items() if key.endswith("zarr.json")),
        blocks=blocks,
    )


def index_bytes(samples: int, checkpoints: int, dim: int, timesteps: int = 1, *, ridge: bool = False) -> int:
    """Bytes of all chunks of an int8 index with integer ids, without columns: to the byte.

    Args:
        samples: n.
        checkpoints: c.
        dim: k.
        timesteps: t under matched pairing, whose rows hold t x k entries; 1 under cross pairing, whose rows are means.
        ridge: whether the estimator has one, which queries carry where there are many samples.
    """
    width = timesteps * dim
    size = chunk_samples(samples, width)  # the last chunk is as long as the others
    planes = checkpoints * (size * width + 2 * 4 * size + 3 * CRC_BYTES)  # rows, scales, norms
    inverses = checkpoints * timesteps * (8 * dim**2 + CRC_BYTES) if ridge and samples >= BY_QUERIES * dim else 0
    return -(-samples // size) * (planes + 8 * size + CRC_BYTES) + inverses


@dataclass(frozen=True)
class Rate:
    """How fast `sketch` runs: `fixed_s` seconds once, and `pair_s` for every pair of sample and timestep."""

    fixed_s: float
    pair_s: float

    def seconds(self, pairs: int) -> float:
        """Predicted seconds for so many pairs on one such worker."""
        return self.fixed_s + pairs * self.pair_s


def measure_sketching(task: DiffusionTask, item: Any, projection: Projection, pairs: int = LARGEST) -> Rate:
    """Time `sketch` on copies of one dataset item, twice with different numbers, so that fixed costs come off.

    Batches and threads are those that `sketch` would measure to be fastest; of a large model one and two pairs are
    timed.

    Args:
        task: model, scheduler and device of the run to come.
        item: what the dataset gives for a sample.
        projection: of the run to come.
        pairs: of it, if that few.
    """
    state = {"calibration": {name: value.detach().clone() for name, value in task.model.state_dict().items()}}
    most = min(pairs, LARGEST)
    plan, ids = EvenlySpaced(1), np.arange(most)
    content, _ = look_through(task, [item] * most, ids)
    sketcher = GradientSketcher(task.model, projection, check=False)
    job = Job(task, [item] * most, ids, content, state, plan, projection, frozenset(sketcher.shapes), {})
    with borrowed_weights(task.model):
        rows, threads = job.fastest(sketcher, "calibration")

    def seconds(samples: int) -> float:
        started = time.perf_counter()
        with torch_threads(threads):
            sketch(
                task,
                [item] * samples,
                None,
                checkpoints=state,
                timesteps=plan,
                projection=projection,
                batch_size=rows,
                progress=False,
            )
        return time.perf_counter() - started

    if seconds(1) > CALIBRATION_SECONDS:  # which also warms up
        rows = 1
    once = seconds(rows)
    more = max(1, min(MOST_BATCHES, int(CALIBRATION_SECONDS / once)))
    few, many = rows, (1 + more) * rows
    runs = [(once, seconds(many))]
    runs += [(seconds(few), seconds(many)) for _ in range(CALIBRATION_RUNS - 1 if more > 1 else 0)]
    pair_s = statistics.median((long - short) / (many - few) for short, long in runs)
    return Rate(max(0.0, statistics.median(short for short, _ in runs) - few * pair_s), max(pair_s, 1e-9))


def measure_scanning(dim: int, queries: int = 1) -> float:
    """Bytes of int8 index per second that a query scans here, from memory."""
    rng = np.random.default_rng(0)
    rows = max(64, SCAN_BYTES // dim)
    some = rng.standard_normal((64, 1, dim), dtype=np.float32)
    store = write_store(None, {"c": np.resize(some, (rows, 1, dim))})
    asked = write_store(None, {"c": rng.standard_normal((queries, 1, dim), dtype=np.float32)})
    index = build_index(store, ReTrac(), None)
    index.query(asked, 10)
    started = time.perf_counter()
    index.query(asked, 10)
    return rows * dim / (time.perf_counter() - started)


def workers_needed(seconds: float, deadline_s: float) -> int:
    """Workers of the calibrated kind that finish so much work by a deadline, blocks being independent."""
    if deadline_s <= 0:
        raise ValueError(f"the deadline must be in the future, got {deadline_s} s.")
    return max(1, math.ceil(seconds / deadline_s))


def example_item(task: DiffusionTask) -> dict[str, Any]:
    """An item of the shape that a task takes, as `encode` keeps it: with noise for a picture, and the empty prompt.

    Raises:
        ValueError: its model's configuration does not tell the shape.
    """
    shape = task.picture_shape
    if shape is None:
        raise ValueError(
            f"the configuration of the {type(task.model).__name__} lacks in_channels or sample_size; time sketch(...) "
            "yourself."
        )
    item: dict[str, Any] = {"image": torch.randn(shape, generator=torch.Generator().manual_seed(0)).tanh()}
    item |= {"label": torch.tensor(0)} if task.told.classes else {}
    item |= {"prompt": ""} if task.told.prompts else {}
    sample, told = task.check_item("of the plan", item)
    return {LATENTS: sample, **told}
