"""TrainingRecorder: notes which pairs the samples are trained at, and sketches their gradients meanwhile."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from retrac_scale.columns import check_columns, check_ids
from retrac_scale.gradients import ParameterFilter
from retrac_scale.projections import Projection
from retrac_scale.store import Dtype, objects
from retrac_scale.store.schema import Url
from retrac_scale.task.checkpoints import StateDict
from retrac_scale.task.items import brought
from retrac_scale.task.measures import measure_name
from retrac_scale.task.noising import is_flow, noising_of, timestep_numbers
from retrac_scale.task.timesteps import check_timesteps, on_host
from retrac_scale.task.weighting import Loss, Weighting, check_loss, check_weighting
from retrac_scale.training.record import (
    IDS,
    NO_SEED,
    ROW,
    SampleRows,
    TrainingRecord,
    append,
    read_record,
    rows_file,
    write_whole,
)
from retrac_scale.training.sketches import SketchPlan, TrainingSketches, Visits

logger = logging.getLogger(__name__)

SAID = "retrac_scale"
"""Key under which the first process tells the others something."""


class TrainingRecorder:
    """Notes in the training loop which timestep and noise each sample was trained at.

    One call per optimizer step and one per kept checkpoint; `Recorded(path)` and `read_record(path)` read what it
    writes. Every step is appended to a file as it is made, so a crash loses none. A folder that holds a record is
    continued from its newest checkpoint, as the training will be; see `restart` for other places. Where several
    processes train together (torch.distributed, so accelerate and Lightning too), each makes a recorder on the same
    folder, after the process group was set up, and records its own part of each step.

    With `sketch` and `store`, the gradient of every sample is sketched in the training step's own backward pass, and
    `checkpoint` adds what was gathered since the last one to a SketchStore, ready for `build_index`. Then every process
    has to call `checkpoint`, on a file system that all share.

    Args:
        path: folder to write to.
        n_samples: size of the training set, whose ids are then 0 .. n-1; or the dataset itself, for its `ids` and
            `columns`.
        scheduler: the diffusers scheduler in use; gives the range of valid timesteps.
        sketch: projection of the gradients, e.g. `LowRank()`; None records without sketching.
        store: where the SketchStore is written, a path or fsspec URL.
        model: the denoiser in training, whose loss is a mean over the batch; others are told by `batch(loss=...)`.
        visits: of each sample that are kept per checkpoint, the last ones before it; a sample with fewer has rows of
            zeros, at timestep -1. Or "sum": all of them in one row, whose product with the checkpoint's weight is the
            sum of learning rate x gradient.
        share: of the optimizer steps that are sketched, chosen at random; a sum is scaled up accordingly.
        measure: the loss in training that queries are to be measured with too: "mse", "l1", `Huber(delta)` or
            `PseudoHuber(c)`.
        weighting: of that loss over timesteps, as of a `DiffusionTask`.
        parameters: glob patterns or a predicate on names; None for all that require a gradient.
        dtype: how the store keeps rows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_samples: int | Sized,
        scheduler: Any,
        *,
        sketch: Projection | None = None,
        store: Url = None,
        model: nn.Module | None = None,
        visits: Visits = 1,
        share: float = 1.0,
        measure: Loss = "mse",
        weighting: Weighting | None = None,
        parameters: ParameterFilter = None,
        dtype: Dtype = "int8",
    ) -> None:
        self.path = Path(path)
        ids = None if isinstance(n_samples, int) else brought(n_samples, "ids")
        self.n_samples = n_samples if isinstance(n_samples, int) else len(n_samples)
        self._scheduler = scheduler
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self._ids = None if ids is None else check_ids(ids, self.n_samples)
        self._samples = SampleRows(self.n_samples, self._ids)
        self._process, self._processes = _process()
        self._batches: list[np.ndarray[Any, Any]] = []
        self._factors: list[Callable[[], Tensor]] = []
        self._file: int | None = None
        self.path.mkdir(parents=True, exist_ok=True)
        self._record: TrainingRecord | None = _from_first(lambda: read_record(self.path))
        self._check_record()
        self._sketches: TrainingSketches | None = None
        if sketch is not None:
            if store is None or model is None:
                raise ValueError("sketching while training needs store=, where to write, and model=, what is trained.")
            check_loss(measure)
            if weighting is not None:
                check_weighting(weighting, noising_of(scheduler, model), measure)
            described = measure_name(measure, weighting)
            plan = SketchPlan(sketch, store, visits, share, described, parameters, dtype)
            columns = check_columns(brought(n_samples, "columns"), self.n_samples)
            known = np.arange(self.n_samples) if self._ids is None else self._ids
            self._sketches = TrainingSketches(
                plan, model, scheduler, self.path, known, columns, self._process, self._processes
            )
            if self._record is None:
                self._sketches.check_new()
        self.restart(list(self._record.checkpoints)[-1] if self._record and self._record.checkpoints else 0)

    @property
    def steps(self) -> int:
        """Optimizer steps recorded so far, those of earlier runs included."""
        return self._steps

    def restart(self, at: str | int) -> None:
        """Say where the training goes on, if not at the newest checkpoint of the record; before the first step.

        Args:
            at: name of a checkpoint, or the number of optimizer steps made. What was recorded after it counts no more
                once the first step is made.
        """
        if self._file is not None:
            raise RuntimeError("restart() comes before the first step of a run.")
        known = self._record.checkpoints if self._record else {}
        if isinstance(at, str) and at not in known:
            raise ValueError(f"{self.path} has no checkpoint {at!r} to restart at; it has {list(known) or 'none'}.")
        self._steps = known[at] if isinstance(at, str) else at
        if self._sketches is not None and known and min(known.values()) > self._steps:
            raise ValueError(
                f"going on after step {self._steps} would take every checkpoint out of the store; to begin anew, "
                f"remove {self.path} and the store, or choose other paths."
            )
        if self._sketches is not None and self._record is not None:
            newest = max(known.values(), default=self._record.begun)
            if self._steps > newest:
                raise ValueError(
                    f"going on after step {self._steps} would leave the steps from {newest + 1} on out of the "
                    "sketches, which end with the newest checkpoint; go on from that, or record without sketching."
                )
        late = [name for name, step in known.items() if step > self._steps]
        if late:
            logger.warning("%s: goes on after step %d; checkpoints %s count no more", self.path, self._steps, late)
        kept = [(name, step) for name, step in known.items() if step <= self._steps]
        self._last_checkpoint = kept[-1] if kept else ("", self._steps)
        self._seen = self._seen_before() // self._processes
        if self._sketches is not None:
            self._gathered_after = self._steps
            self._sketches.prepare(self._steps + 1)

    def step(self, ids: Any, timesteps: Any, noise_seed: int | None, lr: float, *, epoch: int | None = None) -> None:
        """Record one optimizer step, made of one batch: `batch` and `update` together.

        Args:
            ids: samples of the batch, `[n]`.
            timesteps: their diffusion timesteps, `[n]` integers t; in flow matching also `scheduler.timesteps[...]`,
                which are floats.
            noise_seed: the seed given to `draw_noise` for this batch (0 or more), or None when the noise came from
                elsewhere: a fresh draw then stands in for it, as in the paper's own code.
            lr: learning rate of the step.
            epoch: None counts it: samples trained so far / n.
        """
        self.batch(ids, timesteps, noise_seed)
        self.update(lr, epoch=epoch)

    def batch(self, ids: Any, timesteps: Any, noise_seed: int | None, *, loss: Tensor | None = None) -> None:
        """Note a batch of the coming optimizer step; several when gradients accumulate.

        Args:
            ids: see `step`.
            timesteps: see `step`.
            noise_seed: see `step`.
            loss: the batch's mean loss, or the losses of its samples `[n]`, before the backward pass. It tells a
                sketching recorder what the samples' losses are multiplied with afterwards, as in the accumulation of
                gradients, and is not needed where the mean itself is differentiated. A loss that needs no gradient is
                one of an evaluation, and not noted.
        """
        if loss is not None and not loss.requires_grad:
            return
        samples = self._samples.rows(on_host(ids))
        steps = on_host(timesteps)
        if steps.dtype.kind == "f" and is_flow(self._scheduler):
            steps = timestep_numbers(self._scheduler, torch.from_numpy(steps)).numpy()
        if steps.dtype.kind not in "iu":
            raise ValueError(f"timesteps of diffusion are integers, got dtype {steps.dtype}.")
        steps = steps.astype(np.int64)
        if steps.shape != samples.shape:
            raise ValueError(f"got {len(samples)} ids but timesteps of shape {steps.shape}; give one timestep per id.")
        check_timesteps(steps, self.num_train_timesteps)
        if noise_seed is not None and noise_seed < 0:
            raise ValueError(f"noise_seed must be 0 or more, got {noise_seed}.")
        rows = np.zeros(len(samples), ROW)
        rows["sample"], rows["timestep"] = samples, steps
        rows["noise_seed"] = NO_SEED if noise_seed is None else noise_seed
        self._batches.append(rows)
        self._factors.append(_factors(loss, len(rows)))

    def update(self, lr: float, *, epoch: int | None = None) -> None:
        """Record that the optimizer made a step of the batches noted since the last one.

        Args:
            lr: see `step`.
            epoch: see `step`.
        """
        if not self._batches:
            raise ValueError("an optimizer step without a batch; call batch(ids, timesteps, noise_seed) before update.")
        rows = np.concatenate(self._batches)
        factors = [factor() for factor in self._factors] if self._sketches is not None else []
        rows["step"], rows["lr"], rows["rows"], rows["process"] = self._steps + 1, lr, len(rows), self._process
        rows["epoch"] = self._seen * self._processes // self.n_samples if epoch is None else epoch
        if self._file is None:
            self._file = self._begin_run()
        write_whole(self._file, rows.tobytes())
        self._batches.clear()
        self._factors.clear()
        self._steps += 1
        self._seen += len(rows)
        if self._sketches is not None:
            self._sketches.add(rows, factors)
            self._sketches.prepare(self._steps + 1)

    def checkpoint(self, name: str, *, weights: StateDict | None = None) -> None:
        """Mark the weights as they are now by a name; call it where they are saved, best on every process.

        Args:
            name: of the checkpoint.
            weights: what is saved, if not the model's own weights (EMA): queries of the sketches are measured with it.
        """
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a checkpoint; use letters, digits, '-' and '_'.")
        if self._last_checkpoint == (name, self._steps):  # saved twice
            return
        if self._steps == self._last_checkpoint[1]:
            raise ValueError(f"checkpoint {name!r} has no step before it; call step() in the training loop.")
        if self._file is not None:
            os.fsync(self._file)
        if self._sketches is not None:
            self._sketches.flush()
            _wait_for_all()
        failure: Exception | None = None
        if self._process == 0:
            try:
                self._write_checkpoint(name, weights)
            except Exception as error:
                failure = error
        if self._sketches is not None:
            told = _from_first(lambda: "" if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is None and told:
                raise RuntimeError(f"the first process could not write checkpoint {name!r}: {told}")
        if failure is not None:
            raise failure
        if self._sketches is not None:
            self._sketches.clear()
            self._gathered_after = self._steps
        self._last_checkpoint = name, self._steps

    def _write_checkpoint(self, name: str, weights: StateDict | None) -> None:
        record = read_record(self.path)
        if record is not None and name in record.checkpoints:
            raise ValueError(f"{self.path} has a checkpoint {name!r} already; give every checkpoint its own name.")
        if self._sketches is not None:
            assert record is not None  # a step was made
            rows = record.rows(self._gathered_after, self._steps)
            self._sketches.write(name, float(rows["lr"].sum() / self.n_samples), weights)
        append(self.path, {"checkpoint": name, "step": self._steps})

    def close(self) -> None:
        """Leave file and model alone, before another recorder takes them in the same process."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._sketches is not None:
            self._sketches.sketcher.detach()

    def _begin_run(self) -> int:
        """The open file of this process's rows; the first process writes the run into the log."""
        number = len(self._record.runs) if self._record else 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # a file there is of a run that was never logged
        file = os.open(rows_file(self.path, number, self._process), flags, 0o666)
        if self._process == 0:
            if self._sketches is not None and self._record is not None:
                known = self._record.checkpoints.items()
                self._sketches.keep_only([name for name, step in known if step <= self._steps])
            if self._ids is not None and not (self.path / IDS).exists():
                np.save(self.path / f"partial-{IDS}", self._ids)
                objects.force(self.path / f"partial-{IDS}")
                os.replace(self.path / f"partial-{IDS}", self.path / IDS)
            run = {"run": number, "after": self._steps, "processes": self._processes, "n_samples": self.n_samples}
            append(self.path, run)
        for folder in (self.path, self.path.parent):  # they name what was made, which a power cut would lose otherwise
            objects.force(folder)
        return file

    def _check_record(self) -> None:
        if self._record is None:
            return
        if self._record.n_samples != self.n_samples:
            raise ValueError(
                f"{self.path} holds the record of {self._record.n_samples} samples, not {self.n_samples}; "
                "give each training set its own folder."
            )
        held = self._record.ids
        if not (held is None and self._ids is None) and not np.array_equal(held, self._ids):  # type: ignore[arg-type]
            raise ValueError(f"{self.path} holds the record of other ids; give each training set its own folder.")

    def _seen_before(self) -> int:
        """Samples trained in the recorded steps that still count, by all processes."""
        if self._record is None or self._steps <= self._record.begun:
            return 0
        return len(self._record.rows(self._record.begun, self._steps))


def _factors(loss: Tensor | None, n: int) -> Callable[[], Tensor]:
    """What each sample's loss is multiplied with in the value that is differentiated `[n]`, known after backward."""
    if loss is None:
        return lambda: torch.full((n,), 1 / n)
    found: list[Tensor] = []
    loss.register_hook(found.append)  # type: ignore[no-untyped-call]

    def factors() -> Tensor:
        if not found:
            raise ValueError("batch(loss=...) comes before the backward pass of that loss.")
        return found[-1].expand(n) / n if found[-1].ndim == 0 else found[-1]

    return factors


def _wait_for_all() -> None:
    if _process()[1] > 1:
        distributed.barrier()


def _process() -> tuple[int, int]:
    """Number of this process and of all that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _from_first(read: Any) -> Any:
    """What the first process reads, on all of them, so that none sees what another has begun to write.

    It goes through the group's key-value store. Tensors that Python made are freed by gloo's threads, which need the
    interpreter's lock for it; a process that ends meanwhile holds that lock and waits for those threads, for ever.
    """
    process, processes = _process()
    if processes == 1:
        return read()
    store: Any = distributed.distributed_c10d._get_default_store()
    if process == 0:
        store.set(SAID, pickle.dumps(read()))
    distributed.barrier()
    said = pickle.loads(store.get(SAID))
    distributed.barrier()  # all have it, and the first may say something else
    return said
