"""Gradient sketches of a training run, gathered between checkpoints and written into a SketchStore.

Every process gathers its own samples' sketches in a sparse file beside the record; at a checkpoint the first process
merges them into the store, which grows by that checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from retrac_scale.gradients import ParameterFilter
from retrac_scale.projections import Projection
from retrac_scale.projections.live import LiveSketcher
from retrac_scale.store import (
    DamagedStoreError,
    Dtype,
    SketchStore,
    create_store,
    grow_store,
    objects,
    open_store,
    write_block,
)
from retrac_scale.store.part import ROOT, group_json
from retrac_scale.store.schema import Url
from retrac_scale.store.writer import unfinished
from retrac_scale.task.checkpoints import StateDict, adapter_scales, configuration, weights_digest
from retrac_scale.task.noising import scheduler_spec
from retrac_scale.training.record import Rows

Visits = int | Literal["sum"]
KIND = "WhileTraining"


@dataclass(frozen=True)
class SketchPlan:
    """What is sketched while training, and how it is kept.

    Attributes:
        projection: `LowRank()`, `CountSketch(dim)`, ...
        store: where the SketchStore is written, a path or fsspec URL.
        visits: how many visits of each sample are kept per checkpoint, the last ones before it; or "sum": all of them,
            as one row whose product with the checkpoint's weight is the sum of learning rate x gradient.
        share: of the optimizer steps that are sketched, chosen at random; a sum is scaled up accordingly.
        measure: the loss in training, by the name that a task with it gives, which queries are measured with too.
        parameters: glob patterns or a predicate on names; None for all that require a gradient.
        dtype: how rows are stored.
    """

    projection: Projection
    store: Url
    visits: Visits = 1
    share: float = 1.0
    measure: str = "mse"
    parameters: ParameterFilter = None
    dtype: Dtype = "int8"

    def __post_init__(self) -> None:
        if self.visits != "sum" and self.visits < 1:
            raise ValueError(f"visits must be 1 or more, or 'sum', got {self.visits!r}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}.")

    @property
    def kept(self) -> int:
        """Rows t per sample and checkpoint."""
        return 1 if self.visits == "sum" else self.visits

    def takes(self, step: int) -> bool:
        """Whether an optimizer step is sketched; the same on every process and in every run."""
        return self.share == 1 or np.random.default_rng(step).random() < self.share


class TrainingSketches:
    """The sketches of one process since the last checkpoint.

    Args:
        plan: what is sketched.
        model: the denoiser in training, wrapped for several processes or not.
        scheduler: its noise scheduler.
        folder: for the files that gather sketches; shared by all processes.
        ids: of the training set `[n]`.
        columns: of the training set, `{name: [n]}`.
        process: number of this process.
        processes: how many train together.
    """

    def __init__(
        self,
        plan: SketchPlan,
        model: nn.Module,
        scheduler: Any,
        folder: Path,
        ids: npt.NDArray[Any],
        columns: dict[str, npt.NDArray[Any]],
        process: int,
        processes: int,
    ) -> None:
        self.plan, self.scheduler, self.ids, self.columns = plan, scheduler, ids, columns
        self.model: nn.Module = getattr(model, "module", model)  # out of DistributedDataParallel
        self.sketcher = LiveSketcher(self.model, plan.projection, parameters=plan.parameters)
        self._folder, self._process, self._processes = folder, process, processes
        self._kept = np.dtype(
            [("step", "<i8"), ("timestep", "<i8"), ("norm", "<f4"), ("sketch", "<f4", (self.sketcher.dim,))]
        )
        self.clear()

    def clear(self) -> None:
        """Begin to gather anew."""
        self._gathered = np.memmap(self._file(self._process), self._kept, "w+", shape=(len(self.ids), self.plan.kept))
        self._visited = np.zeros(len(self.ids), np.int64)

    def prepare(self, step: int) -> None:
        """Sketch the coming optimizer step, or not, as the plan has it."""
        self.sketcher.recording = self.plan.takes(step)

    def add(self, rows: Rows, factors: Sequence[Tensor]) -> None:
        """Gather the sketches of an optimizer step of this process.

        Args:
            rows: the record's.
            factors: `[n]` for each batch, what the gradient of each sample's loss was multiplied with in the step.
        """
        passes = self.sketcher.passes
        if not self.sketcher.recording:
            return
        if [len(norm) for _, norm in passes] != [len(factor) for factor in factors]:
            raise ValueError(
                f"optimizer step {rows['step'][0]} had batches of {[len(factor) for factor in factors]} samples, but "
                f"backward passes over {[len(norm) for _, norm in passes]} were sketched; note every batch that is "
                "differentiated once, with one id for each row of the model's input."
            )
        at = 0
        for (sketch, norm), factor in zip(passes, factors, strict=True):
            undo = (factor != 0) / factor.where(factor != 0, 1)
            part = rows[at : at + len(factor)]
            self._keep(part, (sketch * undo[:, None].to(sketch)).cpu().numpy(), (norm * undo.to(norm)).cpu().numpy())
            at += len(factor)
        passes.clear()

    def _keep(self, rows: Rows, sketches: npt.NDArray[np.float32], norms: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(norms).all():
            bad = rows[np.argmin(np.isfinite(norms))]
            raise ValueError(
                f"the gradient of sample {self.ids[bad['sample']]} at timestep {bad['timestep']} is NaN or infinite in "
                f"optimizer step {bad['step']}; look at that image and the loss, or train without sketching."
            )
        for row, sketch, norm in zip(rows, sketches, norms, strict=True):
            sample = row["sample"]
            slot = self._visited[sample] % self.plan.kept
            self._visited[sample] += 1
            kept = self._gathered[sample, slot]
            kept["step"], kept["timestep"], kept["norm"] = row["step"], row["timestep"], norm
            if self.plan.visits == "sum":
                kept["sketch"] += np.float32(row["lr"] / self.plan.share) * sketch
            else:
                kept["sketch"] = sketch

    def flush(self) -> None:
        """Let other processes see what was gathered."""
        self._gathered.flush()

    def write(self, name: str, weight: float, weights: StateDict | None = None) -> None:
        """Merge what all processes gathered into the store, as a checkpoint.

        Args:
            name: of the checkpoint.
            weight: w_c.
            weights: that queries are measured with; None: the model's own.
        """
        summed = self.plan.visits == "sum"
        part = self._part(name, weight, self.model.state_dict() if weights is None else weights)
        shape = self._gathered.shape
        files = [np.memmap(self._file(i), self._kept, "r", shape=shape) for i in range(self._processes)]
        for number, block in enumerate(part.blocks):
            gathered = np.concatenate([file[block] for file in files], axis=1)
            if summed:
                sketches = gathered["sketch"].sum(1, keepdims=True) / np.float32(weight or 1)
                write_block(part, name, number, sketches, np.linalg.norm(sketches.astype(np.float64), axis=2))
            else:
                latest = np.argsort(gathered["step"], axis=1, kind="stable")[:, -shape[1] :]
                kept = gathered[np.arange(len(gathered))[:, None], latest]
                steps = np.where(kept["step"] > 0, kept["timestep"], -1)
                write_block(part, name, number, kept["sketch"], kept["norm"], timesteps=steps)

    def _part(self, name: str, weight: float, weights: StateDict) -> SketchStore:
        plan = self.plan
        fingerprint = {
            "projection": plan.projection.spec(),
            "parameters": {key: list(shape) for key, shape in self.sketcher.shapes.items()},
            "checkpoints": {name: weights_digest(weights, adapter_scales(self.model))},
            "scheduler": scheduler_spec(self.scheduler),
            "measure": plan.measure,
            "frozen": configuration(self.model),
            "timesteps": {"kind": KIND, "visits": plan.visits, "share": plan.share},
        }
        pairs = (plan.kept, self.sketcher.dim)
        described: dict[str, Any] = {
            "ids": self.ids,
            "weights": {name: weight},
            "dtype": plan.dtype,
            "quantities": () if plan.visits == "sum" else ("timestep",),
            "columns": self.columns,
        }
        if _existing(plan.store) is None:
            return create_store(plan.store, shape=(len(self.ids), *pairs), fingerprint=fingerprint, **described)
        return grow_store(plan.store, pairs=pairs, describe_part=lambda ids, names: fingerprint, **described)[-1]

    def check_new(self) -> None:
        """Raise ValueError when there is a store already, of another training."""
        if _existing(self.plan.store) is not None:
            raise ValueError(f"{self.plan.store} holds a store already; choose another path for this training.")

    def keep_only(self, checkpoints: Collection[str]) -> None:
        """Remove other checkpoints from the store: the training has gone back before them, and will come to them again.

        Raises:
            ValueError: the store holds something else than what a recorder wrote.
        """
        store = _existing(self.plan.store)
        if store is None:
            return
        if store.fingerprint.get("timesteps", {}).get("kind") != KIND:
            raise ValueError(f"{self.plan.store} holds a store that was not sketched while training; choose another.")
        for part in reversed(store.parts):
            if not set(part.checkpoints) <= set(checkpoints):
                # first its description, without which the rest counts for nothing
                objects.write_all(part.root, {ROOT: group_json(unfinished(part.meta))})
                objects.delete_all(part.root, [key for key in objects.all_keys(part.root) if key != ROOT])

    def _file(self, process: int) -> Path:
        return self._folder / f"gathered-{process:04d}"


def _existing(url: Url) -> SketchStore | None:
    """The store, None when there is none or only one begun; whatever else is there, creating the store names it."""
    try:
        return open_store(url, mode="r+")
    except DamagedStoreError:
        raise
    except (FileNotFoundError, ValueError):
        return None
