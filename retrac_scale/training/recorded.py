"""Recorded: the timesteps and noise that each sample was trained at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Ids, Int64
from retrac_scale.task.timesteps import Pairs, check_timesteps
from retrac_scale.training.record import NO_SEED, SampleRows, TrainingRecord, read_record

STEPS_AT_ONCE = 256
"""Of a training record, that are read."""


@dataclass(frozen=True)
class Recorded:
    """The timestep and noise each sample was really trained at, from the folder a `TrainingRecorder` wrote.

    For checkpoint c this is t_i^c of arXiv 2401.09031: the last pair of sample i before c was kept.
    """

    path: str | os.PathLike[str]
    _cache: dict[str, LastSeen] = field(default_factory=dict, repr=False, compare=False)

    def _seen(self, checkpoint: str) -> LastSeen:
        if checkpoint not in self._cache:
            record = read_record(self.path)
            if record is None:
                raise ValueError(
                    f"no training record for checkpoint {checkpoint!r} in {self.path} (it has none); "
                    "record the training with TrainingRecorder, or use EvenlySpaced(count)."
                )
            self._cache[checkpoint] = last_seen(record, checkpoint)
        return self._cache[checkpoint]

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """One pair per sample, `[n, 1]`."""
        seen = self._seen(checkpoint)
        rows = seen.samples.rows(ids)
        steps = seen.timestep[rows]
        if (steps < 0).any():
            culprit = ids[int(np.argmax(steps < 0))]
            raise ValueError(
                f"sample {culprit} was never trained before checkpoint {checkpoint!r}, so no timestep is recorded for "
                "it; leave it out of the dataset or use EvenlySpaced(count)."
            )
        check_timesteps(steps, num_train_timesteps)
        seeds = seen.seed[rows]
        return Pairs(steps[:, None], np.where(seeds == NO_SEED, 0, seeds)[:, None], 1)

    def weight(self, checkpoint: str) -> float:
        """w_c: the sum over the steps since the previous checkpoint of learning rate x batch size / N."""
        return self._seen(checkpoint).weight

    def spec(self) -> dict[str, Any]:
        """JSON description; the recorded timesteps themselves stand in the store."""
        return {"kind": "Recorded"}


@dataclass(frozen=True)
class LastSeen:
    """The last timestep (-1: none) and noise seed of every sample before a checkpoint, int64 `[n]`, and w_c."""

    samples: SampleRows
    timestep: Int64
    seed: Int64
    weight: float


def last_seen(record: TrainingRecord, checkpoint: str, *, steps_at_once: int = STEPS_AT_ONCE) -> LastSeen:
    """What every sample met last before a checkpoint; reads the record in pieces, from the newest step back."""
    previous, until = record.before(checkpoint)
    timestep, seed = np.full((2, record.n_samples), -1, dtype=np.int64)
    rates: list[npt.NDArray[np.float64]] = []
    last = until
    while last > record.begun and (last > previous or (timestep < 0).any()):  # from the newest step back
        first = max(last - steps_at_once, record.begun)
        rows = record.rows(first, last)
        rates.append(rows["lr"][rows["step"] > previous])
        rows = rows[timestep[rows["sample"]] < 0]
        timestep[rows["sample"]], seed[rows["sample"]] = rows["timestep"], rows["noise_seed"]  # a sample's last stays
        last = first
    weight = float(np.concatenate([np.empty(0), *rates[::-1]]).sum() / record.n_samples)
    return LastSeen(SampleRows(record.n_samples, record.ids), timestep, seed, weight)
