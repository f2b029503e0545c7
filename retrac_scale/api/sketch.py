"""sketch(): measures a dataset, again and again where its answers are to repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from retrac_scale.api.until import check_until, grown_until
from retrac_scale.gradients import ParameterFilter
from retrac_scale.projections import Projection
from retrac_scale.projections.preconditioning import Divisors
from retrac_scale.sketching.request import Request, settle
from retrac_scale.sketching.sketch import sketched_by, sketched_by_plans
from retrac_scale.store import Dtype, Layout, SketchStore
from retrac_scale.store.schema import Url
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import Grid, TimestepPlan, further

if TYPE_CHECKING:
    from distributed import Client


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
    progress: bool | str = True,
) -> SketchStore:
    """Sketch the gradient of every (checkpoint, sample, timestep) into a SketchStore.

    Run again with the same arguments, it computes only the blocks that are missing. Everything that can be checked is
    checked before the first gradient.

    Several measures of a task share each forward pass; each makes a store of its own under the same path, as if it had
    been sketched alone with the same `batch_size`.

    On Linux the process keeps up to 2 GiB of freed memory from then on, see `native.memory.keep_freed_pages`.

    Args:
        task: what is differentiated.
        dataset: map-style; an item is a tensor, (tensor, label or dict of conditioning), or a dict with the image under
            "image", "pixel_values", ... Sample ids come from `dataset.ids`, default 0 .. n-1.
        out: path, fsspec URL, or None for memory, where of a task's measures that of `like` alone is taken.
        checkpoints: {name: state dict, path, or callable returning a state dict}.
        timesteps: `EvenlySpaced(count)`, `Explicit([...])`, `Recorded(path)`, or several of them. None takes those of
            the store at `out`, or of `like`, which makes queries see the noise that the training samples saw; where
            there is neither, four timesteps under common noise.
        projection: `CountSketch(dim)`, `LowRank(rank, dim)`, ...; None takes that of `like` or of the store at `out`,
            else `LowRank` with 2048 entries for all timesteps of a sample together, but at least 512 for each.
        dtype: how rows are stored, "int8", "float16", "bfloat16" or "float32".
        batch_size: rows (pairs x noise draws) per backward pass; "auto" measures which is fastest in a quarter of the
            free memory, and whether one thread of torch is faster than all, as on a busy machine. Both stand in the
            store's plan, and a resumed run or a worker obeys it; a few queries `like` a store take the store's.
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
            foretold to be so much (`repeatability`, of the recommended estimator, which under common noise adds up all
            measures), or `at_most` is spent.
        at_most: timesteps of a sample in all, with `until`.
        layout: how samples are cut into blocks; None chooses.
        client: a `distributed.Client` to spread the blocks over; `out` must be reachable from its workers.
        progress: show a bar with the rate in pairs per second, under this name if it is one.

    Returns:
        the complete store, of the task's first measure, or of all of `like`; `store.under(*task.measures)` has them
        all side by side.

    Raises:
        ValueError: a bad item, id, timestep, checkpoint or projection, named, with what to do.
        ChangedItemsError: items are others than those that the store was made of, or differ between two readings.
        GradientMismatchError: the first pair of a process, recomputed by plain autograd, has another gradient.
        FailedTasksError: some blocks failed; all others are committed, and the same call computes those that are not.
        ConnectionError: the scheduler is gone; what is committed stands.
    """
    request = Request(
        task,
        dataset,
        out,
        checkpoints,
        projection=projection,
        dtype=dtype,
        batch_size=batch_size,
        parameters=parameters,
        precondition=precondition or {},
        like=like,
        grow=grow,
        replace=replace,
        check_all=check_all,
        layout=layout,
        client=client,
        progress=progress,
    )
    request, plans = settle(request, timesteps)
    if until is None:
        return sketched_by_plans(request, plans)
    check_until(until, at_most, plans, out, like)
    first = plans[0]
    assert isinstance(first, Grid)
    store = sketched_by_plans(request, plans)
    again = partial(further, first, num_train_timesteps=task.num_train_timesteps)
    more = partial(sketched_by, changed(request, grow=True, replace=False))
    return grown_until(store, until, at_most, again, more, task.measures)
