"""Which (timestep, noise) pairs a sample is measured at."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from retrac_scale.training.record import NO_SEED, SampleRows, TrainingRecord, read_record

Ids = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

QUERY_SEED = 1
STEPS_AT_ONCE = 256  # of a training record


def draw_noise(
    shape: Sequence[int], ids: Sequence[Any] | Ids | torch.Tensor, timesteps: Any, seed: Any, *, draw: int = 0
) -> torch.Tensor:
    """Standard normal noise for a batch, one independent stream per pair.

    The noise of a pair depends on (seed, id, timestep, draw) and on nothing else, so that it is the same in every
    batch, at every place and on every worker. Training loops that draw their noise here can be replayed exactly.

    Args:
        shape: of one sample, without the batch axis.
        ids: sample ids, integers or strings, `[n]`; an integer tensor, on any device, counts as its numbers.
        timesteps: `[n]` integers t; for the floats of a flow matching loop `timestep_numbers(scheduler, timesteps)`.
        seed: one integer, or one per pair `[n]`.
        draw: number of the noise draw at that timestep.

    Returns:
        float32 `[n, *shape]` on the CPU.

    Raises:
        ValueError: timesteps are no integers, so a replay would draw other noise than the training did.
    """
    given = on_host(timesteps)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(
            f"draw_noise takes integer timesteps, got dtype {given.dtype}; a flow matching loop gives it "
            "timestep_numbers(scheduler, timesteps)."
        )
    steps = given.astype(np.int64)
    seeds = np.broadcast_to(on_host(seed).astype(np.int64), steps.shape)
    out = np.empty((len(steps), *shape), dtype=np.float32)
    samples = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    for row, (sample, step, key) in enumerate(zip(samples, steps, seeds, strict=True)):
        generator = np.random.Generator(
            np.random.Philox(key=[np.uint64(key), _id_bits(sample)], counter=[0, 0, int(step), draw])
        )
        generator.standard_normal(out=out[row], dtype=np.float32)
    return torch.from_numpy(out)


def on_host(values: Any) -> npt.NDArray[Any]:
    """A tensor on any device, a sequence or a number as an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _id_bits(sample: Any) -> np.uint64:
    if isinstance(sample, torch.Tensor):  # its text would be hashed
        sample = sample.item()
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
    """The same chosen timesteps for every sample, with `draws` noises averaged into one gradient at each.

    Attributes:
        timesteps: integers, each once.
        draws: noises at each.
        seed: of the noise, see `draw_noise`; None: 0, and 1 for what is sketched `like` another store, so that queries
            have noise of their own where ids are the same on both sides. A number counts on either side.
    """

    timesteps: Sequence[int]
    draws: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        given = on_host(self.timesteps)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ValueError(f"Explicit takes a list of integer timesteps, got {self.timesteps!r}.")
        steps = tuple(given.tolist())
        if not steps:
            raise ValueError("Explicit got no timesteps; give at least one, e.g. Explicit([10, 500]).")
        if len(set(steps)) != len(steps):
            raise ValueError(
                f"Explicit got a timestep twice in {list(steps)}; give each once and raise draws= instead."
            )
        _check_noise(self.draws, self.seed)
        object.__setattr__(self, "timesteps", steps)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every timestep of the list."""
        steps = np.array(self.timesteps, dtype=np.int64)
        check_timesteps(steps, num_train_timesteps)
        table = np.tile(steps, (len(ids), 1))
        return Pairs(table, np.full_like(table, self.seed or 0), self.draws)

    def weight(self, checkpoint: str) -> float:
        """1: an explicit list knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "Explicit", "timesteps": list(self.timesteps), "draws": self.draws, **_seed_spec(self.seed)}


@dataclass(frozen=True)
class EvenlySpaced:
    """`count` timesteps evenly spaced over 1 .. T-1, as on the query side of arXiv 2401.09031.

    `draws` and `seed` are those of `Explicit`.

    >>> EvenlySpaced(4).pairs("final", np.arange(2), 1000).timesteps.tolist()
    [[1, 334, 666, 999], [1, 334, 666, 999]]
    """

    count: int
    draws: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"EvenlySpaced needs an integer count of 1 or more, got {self.count!r}.")
        _check_noise(self.draws, self.seed)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every one of the evenly spaced timesteps."""
        if self.count >= num_train_timesteps:
            raise ValueError(
                f"EvenlySpaced({self.count}) asks for more timesteps than the scheduler has between 1 and "
                f"{num_train_timesteps - 1}; lower the count."
            )
        steps = np.rint(np.linspace(1, num_train_timesteps - 1, self.count)).astype(np.int64)
        return Explicit(steps.tolist(), self.draws, self.seed).pairs(checkpoint, ids, num_train_timesteps)

    def weight(self, checkpoint: str) -> float:
        """1: a grid knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "EvenlySpaced", "count": self.count, "draws": self.draws, **_seed_spec(self.seed)}


@dataclass(frozen=True)
class Recorded:
    """The timestep and noise each sample was really trained at, from the folder a `TrainingRecorder` wrote.

    For checkpoint c this is t_i^c of arXiv 2401.09031: the last pair of sample i before c was kept.
    """

    path: str | os.PathLike[str]
    _cache: dict[str, _Seen] = field(default_factory=dict, repr=False, compare=False)

    def _seen(self, checkpoint: str) -> _Seen:
        if checkpoint not in self._cache:
            record = read_record(self.path)
            if record is None:
                raise ValueError(
                    f"no training record for checkpoint {checkpoint!r} in {self.path} (it has none); "
                    "record the training with TrainingRecorder, or use EvenlySpaced(count)."
                )
            self._cache[checkpoint] = _last_seen(record, checkpoint)
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
class _Seen:
    """The last timestep (-1: none) and noise seed of every sample before a checkpoint, int64 `[n]`, and w_c."""

    samples: SampleRows
    timestep: Int64
    seed: Int64
    weight: float


def _last_seen(record: TrainingRecord, checkpoint: str) -> _Seen:
    previous, until = record.before(checkpoint)
    timestep, seed = np.full((2, record.n_samples), -1, dtype=np.int64)
    rates: list[npt.NDArray[np.float64]] = []
    last = until
    while last > record.begun and (last > previous or (timestep < 0).any()):  # from the newest step back
        first = max(last - STEPS_AT_ONCE, record.begun)
        rows = record.rows(first, last)
        rates.append(rows["lr"][rows["step"] > previous])
        rows = rows[timestep[rows["sample"]] < 0]
        timestep[rows["sample"]], seed[rows["sample"]] = rows["timestep"], rows["noise_seed"]  # a sample's last stays
        last = first
    weight = float(np.concatenate([np.empty(0), *rates[::-1]]).sum() / record.n_samples)
    return _Seen(SampleRows(record.n_samples, record.ids), timestep, seed, weight)


def check_timesteps(timesteps: Int64, num_train_timesteps: int) -> None:
    """Raise ValueError when a timestep is outside the scheduler's range 0 .. num_train_timesteps - 1."""
    bad = (timesteps < 0) | (timesteps >= num_train_timesteps)
    if bad.any():
        raise ValueError(
            f"timestep {timesteps[bad][0]} is outside the scheduler's range 0 .. {num_train_timesteps - 1}; "
            "choose timesteps in that range or pass the scheduler the model was trained with."
        )


def of_queries(plan: TimestepPlan) -> TimestepPlan:
    """The plan by which queries are measured: a grid whose seed is left open has noise that no training sample has."""
    return replace(plan, seed=QUERY_SEED) if isinstance(plan, Explicit | EvenlySpaced) and plan.seed is None else plan


def _seed_spec(seed: int | None) -> dict[str, int]:
    """Nothing for seed 0: so were stores described before plans had a seed."""
    return {"seed": int(seed)} if seed else {}


def _check_noise(draws: int, seed: int | None) -> None:
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be an integer of 1 or more, got {draws!r}.")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be None or an integer of 0 or more, got {seed}.")
