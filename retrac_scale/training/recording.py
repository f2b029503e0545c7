"""The record of a training, written while it goes on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrac_scale.store import objects
from retrac_scale.task.checkpoints import StateDict
from retrac_scale.task.noising import is_flow, timestep_numbers
from retrac_scale.task.timesteps import check_timesteps, on_host
from retrac_scale.training.record import (
    IDS,
    NO_SEED,
    ROW,
    Rows,
    SampleRows,
    TrainingRecord,
    append,
    read_record,
    rows_file,
    write_whole,
)
from retrac_scale.training.together import from_first, process_of_all

logger = logging.getLogger(__name__)


class Recording:
    """One process's part of a run: its steps are appended to a file of their own, the checkpoints to the log.

    The methods are those of `TrainingRecorder`, which says what their arguments are.

    Args:
        path: the record's folder.
        n_samples: size of the training set.
        ids: of its samples `[n]`; None when they are 0 .. n-1.
        scheduler: whose timesteps are recorded.
    """

    def __init__(self, path: Path, n_samples: int, ids: npt.NDArray[Any] | None, scheduler: Any) -> None:
        self.path = path
        self.n_samples = n_samples
        self.ids = ids
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self._scheduler = scheduler
        self._samples = SampleRows(n_samples, ids)
        self.process, self.processes = process_of_all()
        self._batches: list[Rows] = []
        self._file: int | None = None
        path.mkdir(parents=True, exist_ok=True)
        self.record: TrainingRecord | None = from_first(lambda: read_record(path))
        """As it was before this run."""
        self._check_record()
        self.steps = 0
        """Optimizer steps recorded so far, those of earlier runs included."""

    @property
    def begun(self) -> bool:
        """Whether this run has recorded a step."""
        return self._file is not None

    @property
    def known(self) -> dict[str, int]:
        """The checkpoints that earlier runs have recorded: name -> optimizer steps made before it."""
        return self.record.checkpoints if self.record else {}

    def step_at(self, at: str | int) -> int:
        """The number of optimizer steps made at a place to restart from, which is checked."""
        if self.begun:
            raise RuntimeError("restart() comes before the first step of a run.")
        if isinstance(at, str) and at not in self.known:
            raise ValueError(
                f"{self.path} has no checkpoint {at!r} to restart at; it has {list(self.known) or 'none'}."
            )
        return self.known[at] if isinstance(at, str) else at

    def restart(self, at: str | int) -> None:
        """Go on after a checkpoint or step."""
        self.steps = self.step_at(at)
        late = [name for name, step in self.known.items() if step > self.steps]
        if late:
            logger.warning("%s: goes on after step %d; checkpoints %s count no more", self.path, self.steps, late)
        kept = [(name, step) for name, step in self.known.items() if step <= self.steps]
        self._last_checkpoint = kept[-1] if kept else ("", self.steps)
        self._used = {name for name, _ in kept}
        self._seen = self._seen_before() // self.processes

    def batch(self, ids: Any, timesteps: Any, noise_seed: int | None, loss: Tensor | None = None) -> int:
        """Note a batch of the coming step, and say of how many samples; its loss is not recorded."""
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
        return len(rows)

    def update(self, lr: float, epoch: int | None) -> None:
        """Record the step that the batches make up."""
        self.write(self.rows(lr, epoch))

    def rows(self, lr: float, epoch: int | None) -> Rows:
        """Those of the step that the batches make up."""
        if not self._batches:
            raise ValueError("an optimizer step without a batch; call batch(ids, timesteps, noise_seed) before update.")
        rows = np.concatenate(self._batches)
        rows["step"], rows["lr"], rows["rows"], rows["process"] = self.steps + 1, lr, len(rows), self.process
        rows["epoch"] = self._seen * self.processes // self.n_samples if epoch is None else epoch
        return rows

    def write(self, rows: Rows) -> None:
        """Append a step's rows, and await the batches of the next."""
        if self._file is None:
            self._file = self._begin_run()
        write_whole(self._file, rows.tobytes())
        self._batches.clear()
        self.steps += 1
        self._seen += len(rows)

    def checkpoint(self, name: str, weights: StateDict | None = None) -> None:
        """Mark a checkpoint; its weights are not recorded."""
        if self.marked(name):
            return
        self.force()
        if self.process == 0:
            self.mark(name)
        self.pass_by(name)

    def marked(self, name: str) -> bool:
        """Whether this very checkpoint was marked just before; raises where the name, or the time, is not fit."""
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a checkpoint; use letters, digits, '-' and '_'.")
        if self._last_checkpoint == (name, self.steps):
            return True
        if self.steps == self._last_checkpoint[1]:
            raise ValueError(f"checkpoint {name!r} has no step before it; call step() in the training loop.")
        if name in self._used:  # which each process knows of itself, so that all of them raise
            raise ValueError(f"{self.path} has a checkpoint {name!r} already; give every checkpoint its own name.")
        return False

    def force(self) -> None:
        """Have what was recorded outlive a power cut."""
        if self._file is not None:
            os.fsync(self._file)

    def mark(self, name: str) -> None:
        """Write a checkpoint into the log."""
        append(self.path, {"checkpoint": name, "step": self.steps})

    def pass_by(self, name: str) -> None:
        """Await steps after a checkpoint."""
        self._last_checkpoint = name, self.steps
        self._used.add(name)

    def close(self) -> None:
        """Leave the file alone."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin_run(self) -> int:
        """The open file of this process's rows; the first process writes the run into the log."""
        number = len(self.record.runs) if self.record else 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # a file there is of a run that was never logged
        file = os.open(rows_file(self.path, number, self.process), flags, 0o666)
        if self.process == 0:
            if self.ids is not None and not (self.path / IDS).exists():
                np.save(self.path / f"partial-{IDS}", self.ids)
                objects.force(self.path / f"partial-{IDS}")
                os.replace(self.path / f"partial-{IDS}", self.path / IDS)
            run = {"run": number, "after": self.steps, "processes": self.processes, "n_samples": self.n_samples}
            append(self.path, run)
        objects.force(self.path)  # it names what was made, which a power cut would lose otherwise
        objects.force_above(self.path)
        return file

    def _check_record(self) -> None:
        if self.record is None:
            return
        if self.record.n_samples != self.n_samples:
            raise ValueError(
                f"{self.path} holds the record of {self.record.n_samples} samples, not {self.n_samples}; "
                "give each training set its own folder."
            )
        held = self.record.ids
        if not (held is None and self.ids is None) and not np.array_equal(held, self.ids):  # type: ignore[arg-type]
            raise ValueError(f"{self.path} holds the record of other ids; give each training set its own folder.")

    def _seen_before(self) -> int:
        """Samples trained in the recorded steps that still count, by all processes."""
        if self.record is None or self.steps <= self.record.begun:
            return 0
        return len(self.record.rows(self.record.begun, self.steps))
