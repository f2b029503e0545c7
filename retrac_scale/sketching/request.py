"""What a call of sketch() asks for, checked and with its defaults filled in before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from zarr.storage import MemoryStore

from retrac_scale.gradients import ParameterFilter
from retrac_scale.projections import LowRank, Projection, from_spec
from retrac_scale.projections.preconditioning import Divisors
from retrac_scale.sketching.plans import plans_of_call
from retrac_scale.store import Dtype, Layout, SketchStore, open_store
from retrac_scale.store.compatibility import warn_of_versions
from retrac_scale.store.encoding import check_dtype
from retrac_scale.store.part import measures_in
from retrac_scale.store.schema import Url
from retrac_scale.task.checkpoints import Checkpoint, absolute
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import TimestepPlan

if TYPE_CHECKING:
    from distributed import Client

ROW_ENTRIES, LEAST_DIM = 2048, 512
"""Entries of all timesteps of a sample and checkpoint together, and at least of each, where no projection is given."""


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `retrac_scale.sketch`, see there, but those that say at which timesteps."""

    task: DiffusionTask
    dataset: Any
    out: Url
    checkpoints: Mapping[str, Checkpoint]
    projection: Projection | None = None
    dtype: Dtype = "int8"
    batch_size: int | Literal["auto"] = "auto"
    parameters: ParameterFilter = None
    precondition: Mapping[str, Divisors] = field(default_factory=dict)
    like: SketchStore | None = None
    grow: bool = False
    replace: bool = False
    check_all: bool = False
    layout: Layout | None = None
    client: Client | None = None
    progress: bool | str = True
    together: tuple[str, ...] = ()
    """Measures that `like` was opened under, if several; what is sketched is given back so too."""

    def projection_of(self, timesteps: int) -> Projection:
        """The projection, or the default for so many timesteps of a sample."""
        if self.projection is None:
            return LowRank(dim=max(LEAST_DIM, ROW_ENTRIES // timesteps))
        return self.projection


def settle(
    request: Request, timesteps: TimestepPlan | Sequence[TimestepPlan] | None
) -> tuple[Request, list[TimestepPlan]]:
    """The request with what the store at `out` and that at `like` say, and the plans to measure by.

    Raises:
        ValueError: what is asked for does not go together.
    """
    check(request)
    request = _with_measures(request)
    like, there = request.like, existing(request.out)
    known = like or there
    for store in (like, there):
        if store is not None:
            warn_of_versions(store)
    plans = plans_of_call(timesteps, like, there)
    changes: dict[str, Any] = {"checkpoints": absolute(request.checkpoints)}
    if request.projection is None and known is not None:
        changes["projection"] = from_spec(known.fingerprint["projection"])
    if like is not None and request.parameters is None:
        changes["parameters"] = list(like.fingerprint["parameters"]).__contains__
    if request.out is None:
        task = _as_measured(request)
        changes |= {"task": task, "out": MemoryStore() if len(plans) > 1 or len(task.measures) > 1 else None}
    return replace(request, **changes), plans


def check(request: Request) -> None:
    """Raise ValueError for what is wrong whatever is there already."""
    check_dtype(request.dtype)
    size, projection = request.batch_size, request.projection
    if not request.checkpoints or not isinstance(request.checkpoints, Mapping):
        raise ValueError(f"sketch needs checkpoints={{'name': path or state dict}}, got {request.checkpoints!r}.")
    if size != "auto" and not (isinstance(size, int) and size >= 1):
        raise ValueError(f"batch_size must be 'auto' or an integer of 1 or more, got {size!r}.")
    if projection is not None and not isinstance(projection, Projection):
        raise ValueError(f"projection must be one, such as CountSketch(4096), got {projection!r}.")
    if request.client is not None and request.out is None:
        raise ValueError("workers cannot write into this process's memory; give out= a path or URL they can reach.")
    if request.grow and request.out is None:
        raise ValueError("grow=True adds to a store that is there; give out= its path or URL.")
    divisors = request.precondition
    if divisors and divisors.keys() != request.checkpoints.keys():
        raise ValueError(
            f"precondition is given for {sorted(divisors)}, checkpoints are {sorted(request.checkpoints)}."
        )


def _with_measures(request: Request) -> Request:
    """A request like a store of several measures side by side, as one like the first of them with a task of all."""
    like = request.like
    if like is None or len(measures := measures_in(like.fingerprint)) == 1:
        return request
    if set(measures) - set(request.task.measures):
        raise ValueError(
            f"like= holds {' and '.join(measures)} side by side, and the task measures "
            f"{' and '.join(request.task.measures)}; give it DiffusionTask(..., measure={measures})."
        )
    out: Any = MemoryStore() if request.out is None else request.out
    one, task = like.under(measures[0]), request.task.only(*measures)
    return replace(request, like=one, task=task, out=out, together=tuple(measures))


def existing(out: Url) -> SketchStore | None:
    """The store at `out`, None when there is none yet."""
    try:
        return None if out is None else open_store(out)
    except (FileNotFoundError, ValueError):  # whatever else is there, creating the store names it
        return None


def _as_measured(request: Request) -> DiffusionTask:
    """The task with the measure of `like` alone, if it has that among several."""
    task, like = request.task, request.like
    measure = None if like is None else like.fingerprint.get("measure")
    return task.only(measure) if measure in task.measures else task
