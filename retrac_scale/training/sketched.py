"""Recording a training and sketching its gradients meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrac_scale.task.checkpoints import StateDict
from retrac_scale.training.record import read_record
from retrac_scale.training.recording import Recording
from retrac_scale.training.sketches import TrainingSketches
from retrac_scale.training.together import from_first, wait_for_all


class SketchedRecording:
    """A recording whose steps are sketched, and whose checkpoints add to a store; its methods are those of `Recording`.

    Args:
        recording: of this process.
        sketches: of this process.

    Raises:
        ValueError: the store is of another training.
    """

    def __init__(self, recording: Recording, sketches: TrainingSketches) -> None:
        self._recording = recording
        self._sketches = sketches
        self._factors: list[Callable[[], Tensor]] = []
        if recording.record is None:
            sketches.check_new()

    @property
    def steps(self) -> int:
        """See `Recording`."""
        return self._recording.steps

    def restart(self, at: str | int) -> None:
        """Go on where the sketches in the store end, or before."""
        recording, step = self._recording, self._recording.step_at(at)
        if recording.known and min(recording.known.values()) > step:
            raise ValueError(
                f"going on after step {step} would take every checkpoint out of the store; to begin anew, "
                f"remove {recording.path} and the store, or choose other paths."
            )
        if recording.record is not None:
            newest = max(recording.known.values(), default=recording.record.begun)
            if step > newest:
                raise ValueError(
                    f"going on after step {step} would leave the steps from {newest + 1} on out of the "
                    "sketches, which end with the newest checkpoint; go on from that, or record without sketching."
                )
        recording.restart(at)
        self._gathered_after = step
        self._sketches.prepare(step + 1)

    def batch(self, ids: Any, timesteps: Any, noise_seed: int | None, loss: Tensor | None = None) -> None:
        """Note a batch, and what the gradients of its samples are multiplied with."""
        self._factors.append(_factors(loss, self._recording.batch(ids, timesteps, noise_seed)))

    def update(self, lr: float, epoch: int | None) -> None:
        """Record a step and gather its sketches."""
        recording = self._recording
        rows = recording.rows(lr, epoch)
        factors = [factor() for factor in self._factors]
        if not recording.begun and recording.process == 0 and recording.record is not None:
            self._sketches.keep_only([name for name, step in recording.known.items() if step <= recording.steps])
        recording.write(rows)
        self._factors.clear()
        self._sketches.add(rows, factors)
        self._sketches.prepare(recording.steps + 1)

    def checkpoint(self, name: str, weights: StateDict | None = None) -> None:
        """Add what all processes have gathered to the store, then mark the checkpoint."""
        recording = self._recording
        if recording.marked(name):
            return
        recording.force()
        self._sketches.flush()
        wait_for_all()
        from_first(lambda: self._write(name, weights))
        self._sketches.clear()
        self._gathered_after = recording.steps
        recording.pass_by(name)

    def close(self) -> None:
        """Leave file and model alone."""
        self._recording.close()
        self._sketches.sketcher.detach()

    def _write(self, name: str, weights: StateDict | None) -> None:
        recording = self._recording
        record = read_record(recording.path)
        assert record is not None  # a step was made
        rows = record.rows(self._gathered_after, recording.steps)
        self._sketches.write(name, float(rows["lr"].sum() / recording.n_samples), weights)
        recording.mark(name)


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
