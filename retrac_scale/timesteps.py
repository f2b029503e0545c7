"""Which (timestep, noise) pairs a sample is measured at, and the record of those it was trained at."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

NO_SEED = -1


def draw_noise(
    shape: Sequence[int], ids: Sequence[Any] | Ids, timesteps: Any, seed: Any, *, draw: int = 0
) -> torch.Tensor:
    """Standard normal noise for a batch, one independent stream per pair.

    The noise of a pair depends on (seed, id, timestep, draw) and on nothing else, so that it is the same in every
    batch, at every place and on every worker. Training loops that draw their noise here can be replayed exactly.

    Args:
        shape: of one sample, without the batch axis.
        ids: sample ids, integers or strings, `[n]`.
        timesteps: `[n]` integers.
        seed: one integer, or one per pair `[n]`.
        draw: number of the noise draw at that timestep.

    Returns:
        float32 `[n, *shape]` on the CPU.
    """
    steps = np.asarray(timesteps, dtype=np.int64)
    seeds = np.broadcast_to(np.asarray(seed, dtype=np.int64), steps.shape)
    out = np.empty((len(steps), *shape), dtype=np.float32)
    for row, (sample, step, key) in enumerate(zip(ids, steps, seeds, strict=True)):
        generator = np.random.Generator(
            np.random.Philox(key=[np.uint64(key), _id_bits(sample)], counter=[0, 0, int(step), draw])
        )
        generator.standard_normal(out=out[row], dtype=np.float32)
    return torch.from_numpy(out)


def _id_bits(sample: Any) -> np.uint64:
    if isinstance(sample, (int, np.integer)):
        return np.uint64(int(sample) & 0xFFFFFFFFFFFFFFFF)
    digest = hashlib.blake2b(str(sample).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Pairs:
    """The pairs of some samples at a checkpoint: `timesteps` and noise `seeds`, both `[n, t]`, `draws` noises each."""

    timesteps: Int64
    seeds: Int64
    draws: int


class TimestepPlan(Protocol):
    """What `sketch(timesteps=...)` accepts: says which pairs to measure each sample at."""

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """The pairs of samples `ids` at a checkpoint."""

    def weight(self, checkpoint: str) -> float:
        """The checkpoint weight w_c that the plan knows of, 1 when unknown."""

    def spec(self) -> dict[str, Any]:
        """A JSON description that goes into the store's fingerprint."""


@dataclass(frozen=True)
class Explicit:
    """The same chosen timesteps for every sample, with `draws` noises averaged into one gradient at each."""

    timesteps: Sequence[int]
    draws: int = 1

    def __post_init__(self) -> None:
        steps = tuple(int(t) for t in self.timesteps)
        if not steps:
            raise ValueError("Explicit got no timesteps; give at least one, e.g. Explicit([10, 500]).")
        if len(set(steps)) != len(steps):
            raise ValueError(
                f"Explicit got a timestep twice in {list(steps)}; give each once and raise draws= instead."
            )
        _check_draws(self.draws)
        object.__setattr__(self, "timesteps", steps)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every timestep of the list."""
        steps = np.array(self.timesteps, dtype=np.int64)
        check_timesteps(steps, num_train_timesteps)
        table = np.tile(steps, (len(ids), 1))
        return Pairs(table, np.zeros_like(table), self.draws)

    def weight(self, checkpoint: str) -> float:
        """1: an explicit list knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "Explicit", "timesteps": list(self.timesteps), "draws": self.draws}


@dataclass(frozen=True)
class EvenlySpaced:
    """`count` timesteps evenly spaced over 1 .. T-1, as on the query side of arXiv 2401.09031."""

    count: int
    draws: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"EvenlySpaced needs a count of 1 or more, got {self.count}.")
        _check_draws(self.draws)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every one of the evenly spaced timesteps."""
        if self.count >= num_train_timesteps:
            raise ValueError(
                f"EvenlySpaced({self.count}) asks for more timesteps than the scheduler has between 1 and "
                f"{num_train_timesteps - 1}; lower the count."
            )
        steps = np.rint(np.linspace(1, num_train_timesteps - 1, self.count)).astype(np.int64)
        return Explicit(steps.tolist(), self.draws).pairs(checkpoint, ids, num_train_timesteps)

    def weight(self, checkpoint: str) -> float:
        """1: a grid knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "EvenlySpaced", "count": self.count, "draws": self.draws}


@dataclass(frozen=True)
class Recorded:
    """The timestep and noise each sample was really trained at, from the folder a `TrainingRecorder` wrote.

    For checkpoint c this is t_i^c of arXiv 2401.09031: the last pair of sample i before c was kept.
    """

    path: str | os.PathLike[str]
    _cache: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def _record(self, checkpoint: str) -> dict[str, Any]:
        if checkpoint not in self._cache:
            file = _record_file(self.path, checkpoint)
            if not file.exists():
                known = sorted(p.stem for p in Path(self.path).glob("*.npz"))
                raise ValueError(
                    f"no training record for checkpoint {checkpoint!r} in {self.path} (it has {known or 'none'}); "
                    "name the checkpoints as in TrainingRecorder.checkpoint(name), or use EvenlySpaced(count)."
                )
            with np.load(file, allow_pickle=False) as data:
                self._cache[checkpoint] = {key: data[key] for key in data.files}
        return self._cache[checkpoint]

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """One pair per sample, `[n, 1]`."""
        record = self._record(checkpoint)
        rows = _record_rows(ids, len(record["timestep"]))
        steps = record["timestep"][rows]
        if (steps < 0).any():
            culprit = ids[int(np.argmax(steps < 0))]
            raise ValueError(
                f"sample {culprit} was never trained before checkpoint {checkpoint!r}, so no timestep is recorded for "
                "it; leave it out of the dataset or use EvenlySpaced(count)."
            )
        check_timesteps(steps, num_train_timesteps)
        seeds = record["noise_seed"][rows]
        return Pairs(steps[:, None], np.where(seeds == NO_SEED, 0, seeds)[:, None], 1)

    def weight(self, checkpoint: str) -> float:
        """w_c: the sum over the steps since the previous checkpoint of learning rate x batch size / N."""
        return float(self._record(checkpoint)["weight"])

    def spec(self) -> dict[str, Any]:
        """JSON description; the recorded timesteps themselves stand in the store."""
        return {"kind": "Recorded"}


class TrainingRecorder:
    """Notes in the training loop which timestep and noise each sample was trained at.

    One call per optimizer step and one per kept checkpoint; a folder of small .npz files results, which
    `Recorded(path)` reads. An existing folder is continued from its newest checkpoint.

    Args:
        path: folder to write to.
        n_samples: size of the training set; ids are 0 .. n_samples - 1.
        scheduler: the diffusers scheduler in use; gives the range of valid timesteps.
    """

    def __init__(self, path: str | os.PathLike[str], n_samples: int, scheduler: Any) -> None:
        self.path = Path(path)
        self.n_samples = n_samples
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self._timestep = np.full(n_samples, -1, dtype=np.int64)
        self._seed = np.full(n_samples, NO_SEED, dtype=np.int64)
        self._weight = 0.0
        self._steps = 0
        self.path.mkdir(parents=True, exist_ok=True)
        self._continue()

    def step(
        self, ids: Sequence[int] | Int64 | torch.Tensor, timesteps: Any, noise_seed: int | None, lr: float
    ) -> None:
        """Record one optimizer step.

        Args:
            ids: samples of the batch, `[n]`.
            timesteps: their diffusion timesteps, `[n]`.
            noise_seed: the seed given to `draw_noise` for this batch (0 or more), or None when the noise came from
                elsewhere: a fresh draw then stands in for it, as in the paper's own code.
            lr: learning rate of the step.
        """
        rows = _record_rows(np.asarray(ids), self.n_samples)
        steps = np.asarray(timesteps, dtype=np.int64)
        if steps.shape != rows.shape:
            raise ValueError(f"got {len(rows)} ids but timesteps of shape {steps.shape}; give one timestep per id.")
        check_timesteps(steps, self.num_train_timesteps)
        if noise_seed is not None and noise_seed < 0:
            raise ValueError(f"noise_seed must be 0 or more, got {noise_seed}.")
        self._timestep[rows] = steps
        self._seed[rows] = NO_SEED if noise_seed is None else noise_seed
        self._weight += lr * len(rows) / self.n_samples
        self._steps += 1

    def checkpoint(self, name: str) -> None:
        """Write what was recorded up to here under the checkpoint's name; call it where the weights are saved."""
        if self._steps == 0:
            raise ValueError(f"checkpoint {name!r} has no step before it; call step() in the training loop.")
        final = _record_file(self.path, name)
        partial = final.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, timestep=self._timestep, noise_seed=self._seed, weight=self._weight, steps=self._steps)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        self._weight, self._steps = 0.0, 0

    def _continue(self) -> None:
        files = sorted(self.path.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
        if not files:
            return
        with np.load(files[-1], allow_pickle=False) as data:
            if len(data["timestep"]) != self.n_samples:
                raise ValueError(
                    f"{self.path} holds the record of {len(data['timestep'])} samples, not {self.n_samples}; "
                    "give each training set its own folder."
                )
            self._timestep, self._seed = data["timestep"], data["noise_seed"]


def _record_file(path: str | os.PathLike[str], checkpoint: str) -> Path:
    if not checkpoint or "/" in checkpoint or checkpoint.startswith("."):
        raise ValueError(f"{checkpoint!r} cannot name a checkpoint; use letters, digits, '-' and '_'.")
    return Path(path) / f"{checkpoint}.npz"


def _record_rows(ids: Ids, n_samples: int) -> Int64:
    if ids.dtype.kind not in "iu":
        raise ValueError(f"recorded sample ids are the integers 0 .. {n_samples - 1}, got dtype {ids.dtype}.")
    bad = (ids < 0) | (ids >= n_samples)
    if bad.any():
        raise ValueError(f"sample id {ids[bad][0]} is outside the recorded training set 0 .. {n_samples - 1}.")
    return ids.astype(np.int64)


def check_timesteps(timesteps: Int64, num_train_timesteps: int) -> None:
    """Raise ValueError when a timestep is outside the scheduler's range 0 .. num_train_timesteps - 1."""
    bad = (timesteps < 0) | (timesteps >= num_train_timesteps)
    if bad.any():
        raise ValueError(
            f"timestep {timesteps[bad][0]} is outside the scheduler's range 0 .. {num_train_timesteps - 1}; "
            "choose timesteps in that range or pass the scheduler the model was trained with."
        )


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}.")
