"""TrainingRecorder: notes which pairs the samples are trained at, and sketches their gradients meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from retrac_scale.columns import check_columns, check_ids
from retrac_scale.gradients import ParameterFilter
from retrac_scale.projections import Projection
from retrac_scale.store import Dtype
from retrac_scale.store.schema import Url
from retrac_scale.task.checkpoints import StateDict
from retrac_scale.task.items import brought
from retrac_scale.task.measures import measure_name
from retrac_scale.task.noising import noising_of
from retrac_scale.task.weighting import Loss, Weighting, check_loss, check_weighting
from retrac_scale.training.recording import Recording
from retrac_scale.training.sketched import SketchedRecording
from retrac_scale.training.sketches import SketchPlan, TrainingSketches, Visits


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
        ids = None if isinstance(n_samples, int) else brought(n_samples, "ids")
        self.n_samples = n_samples if isinstance(n_samples, int) else len(n_samples)
        known = None if ids is None else check_ids(ids, self.n_samples)
        recording = Recording(Path(path), self.n_samples, known, scheduler)
        self.path, self.num_train_timesteps = recording.path, recording.num_train_timesteps
        self._recording: Recording | SketchedRecording = recording
        if sketch is not None:
            if store is None or model is None:
                raise ValueError("sketching while training needs store=, where to write, and model=, what is trained.")
            check_loss(measure)
            if weighting is not None:
                check_weighting(weighting, noising_of(scheduler, model), measure)
            plan = SketchPlan(sketch, store, visits, share, measure_name(measure, weighting), parameters, dtype)
            columns = check_columns(brought(n_samples, "columns"), self.n_samples)
            of = np.arange(self.n_samples) if known is None else known
            processes = recording.process, recording.processes
            sketches = TrainingSketches(plan, model, scheduler, recording.path, of, columns, *processes)
            self._recording = SketchedRecording(recording, sketches)
        self.restart(list(recording.known)[-1] if recording.known else 0)

    @property
    def steps(self) -> int:
        """Optimizer steps recorded so far, those of earlier runs included."""
        return self._recording.steps

    def restart(self, at: str | int) -> None:
        """Say where the training goes on, if not at the newest checkpoint of the record; before the first step.

        Args:
            at: name of a checkpoint, or the number of optimizer steps made. What was recorded after it counts no more
                once the first step is made.
        """
        self._recording.restart(at)

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
        self._recording.batch(ids, timesteps, noise_seed, loss)

    def update(self, lr: float, *, epoch: int | None = None) -> None:
        """Record that the optimizer made a step of the batches noted since the last one.

        Args:
            lr: see `step`.
            epoch: see `step`.
        """
        self._recording.update(lr, epoch)

    def checkpoint(self, name: str, *, weights: StateDict | None = None) -> None:
        """Mark the weights as they are now by a name; call it where they are saved, best on every process.

        Args:
            name: of the checkpoint.
            weights: what is saved, if not the model's own weights (EMA): queries of the sketches are measured with it.
        """
        self._recording.checkpoint(name, weights)

    def close(self) -> None:
        """Leave file and model alone, before another recorder takes them in the same process."""
        self._recording.close()
