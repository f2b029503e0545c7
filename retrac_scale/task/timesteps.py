"""Which (timestep, noise) pairs a sample is measured at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch

from retrac_scale.arrays import Ids, Int64

Noise = Literal["common", "own"]
"""Whether all samples, queries too, share the noise of a timestep and draw, or each sample has noise of its own."""

QUERY_SEED = 1
"""Of own noise: queries have other noise than training samples of the same ids."""
COMMON, OWN = 1, 0
"""Second word of a stream's counter, so that common noise is no sample's own."""


def draw_noise(
    shape: Sequence[int], ids: Sequence[Any] | Ids | torch.Tensor | None, timesteps: Any, seed: Any, *, draw: int = 0
) -> torch.Tensor:
    """Standard normal noise for a batch, one independent stream per pair.

    The noise of a pair depends on (seed, id, timestep, draw) and on nothing else, so that it is the same in every
    batch, at every place and on every worker. Training loops that draw their noise here can be replayed exactly.

    Args:
        shape: of one sample, without the batch axis.
        ids: sample ids, integers or strings, `[n]`; an integer tensor, on any device, counts as its numbers. None for
            common noise, which depends on (seed, timestep, draw) alone and is the same for every sample.
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
    if ids is None:  # few timesteps, many pairs: each noise is drawn once
        (seeds, steps), places = np.unique(np.stack([seeds, steps]), axis=1, return_inverse=True)
        whose = torch.from_numpy(places.reshape(-1))  # NumPy 2.0.0 gives [1, n]
        return _drawn(shape, [0] * len(steps), steps, seeds, draw, COMMON)[whose]
    return _drawn(shape, ids.tolist() if isinstance(ids, torch.Tensor) else ids, steps, seeds, draw, OWN)


def _drawn(
    shape: Sequence[int], samples: Sequence[Any] | Ids, steps: Int64, seeds: Int64, draw: int, kind: int
) -> torch.Tensor:
    out = np.empty((len(steps), *shape), dtype=np.float32)
    for row, (sample, step, key) in enumerate(zip(samples, steps, seeds, strict=True)):
        bits = np.random.Philox(key=[np.uint64(key), _id_bits(sample)], counter=[0, kind, int(step), draw])
        np.random.Generator(bits).standard_normal(out=out[row], dtype=np.float32)
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
    noise: Noise = "own"

    def some(self, rows: Any) -> Pairs:
        """Those of some of the samples."""
        return replace(self, timesteps=self.timesteps[rows], seeds=self.seeds[rows])


def plan_digest(plans: Mapping[str, Pairs]) -> str:
    """A digest of every timestep and noise seed of some samples at some checkpoints."""
    digest = hashlib.blake2b(digest_size=16)
    for name, plan in plans.items():
        digest.update(name.encode() + plan.timesteps.tobytes() + plan.seeds.tobytes())
    return digest.hexdigest()


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
        seed: of the noise, see `draw_noise`. None: 0; what is sketched `like` a store has the store's seed where noise
            is common, and 1 where it is own, so that no query is noised as a training sample of the same id.
        noise: "common": at a timestep all samples and all queries see the same noise, so that two images differ in
            their gradients by what they are and not by their draws; "own": every sample has noise of its own.
    """

    timesteps: Sequence[int]
    draws: int = 1
    seed: int | None = None
    noise: Noise = "common"

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
        _check_noise(self)
        object.__setattr__(self, "timesteps", steps)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every timestep of the list."""
        steps = np.array(self.timesteps, dtype=np.int64)
        check_timesteps(steps, num_train_timesteps)
        table = np.tile(steps, (len(ids), 1))
        return Pairs(table, np.full_like(table, self.seed or 0), self.draws, self.noise)

    def weight(self, checkpoint: str) -> float:
        """1: an explicit list knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "Explicit", "timesteps": list(self.timesteps), "draws": self.draws, **_noise_spec(self)}


@dataclass(frozen=True)
class EvenlySpaced:
    """`count` timesteps evenly spaced over 0 .. T-1.

    Under common noise they are the middles of as many equal intervals: at t = 0 nothing is to be learnt, and at T - 1
    nothing of the image is left. With noise of their own they run from 1 to T - 1, as on the query side of
    arXiv 2401.09031; a single one is the middle. `draws`, `seed` and `noise` are those of `Explicit`.

    >>> EvenlySpaced(4).pairs("final", np.arange(2), 1000).timesteps.tolist()
    [[125, 375, 625, 875], [125, 375, 625, 875]]
    >>> EvenlySpaced(4, noise="own").pairs("final", np.arange(1), 1000).timesteps.tolist()
    [[1, 334, 666, 999]]
    """

    count: int
    draws: int = 1
    seed: int | None = None
    noise: Noise = "common"

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"EvenlySpaced needs an integer count of 1 or more, got {self.count!r}.")
        _check_noise(self)

    def pairs(self, checkpoint: str, ids: Ids, num_train_timesteps: int) -> Pairs:
        """Every sample at every one of the evenly spaced timesteps."""
        if self.count >= num_train_timesteps:
            raise ValueError(
                f"EvenlySpaced({self.count}) asks for more timesteps than the scheduler has between 1 and "
                f"{num_train_timesteps - 1}; lower the count."
            )
        if self.noise == "common":
            steps = (2 * np.arange(self.count) + 1) * num_train_timesteps // (2 * self.count)
        else:
            ends = (1, num_train_timesteps - 1) if self.count > 1 else (num_train_timesteps // 2,) * 2
            steps = np.rint(np.linspace(*ends, self.count)).astype(np.int64)
        same = Explicit(steps.tolist(), self.draws, self.seed, self.noise)
        return same.pairs(checkpoint, ids, num_train_timesteps)

    def weight(self, checkpoint: str) -> float:
        """1: a grid knows nothing of the training."""
        return 1.0

    def spec(self) -> dict[str, Any]:
        """JSON description."""
        return {"kind": "EvenlySpaced", "count": self.count, "draws": self.draws, **_noise_spec(self)}


Grid = Explicit | EvenlySpaced
"""Plans by which every sample is measured at the same timesteps."""


def check_timesteps(timesteps: Int64, num_train_timesteps: int) -> None:
    """Raise ValueError when a timestep is outside the scheduler's range 0 .. num_train_timesteps - 1."""
    bad = (timesteps < 0) | (timesteps >= num_train_timesteps)
    if bad.any():
        raise ValueError(
            f"timestep {timesteps[bad][0]} is outside the scheduler's range 0 .. {num_train_timesteps - 1}; "
            "choose timesteps in that range or pass the scheduler the model was trained with."
        )


def of_queries(plan: TimestepPlan, stored: Sequence[Mapping[str, Any]]) -> TimestepPlan:
    """The plan by which queries are measured, where its seed is left open.

    Common noise has the seed of the store's, so that both sides see the same; own noise one that no sample there has.

    Args:
        plan: of the queries.
        stored: descriptions of the store's plans.
    """
    if not isinstance(plan, Grid) or plan.seed is not None:
        return plan
    common = [one.get("seed", 0) for one in stored if one.get("noise") == "common"]
    return replace(plan, seed=QUERY_SEED if plan.noise == "own" else common[0] if common else 0)


def grid_from_spec(spec: Mapping[str, Any]) -> Grid | None:
    """The grid that a store's fingerprint describes; None for other plans, which depend on more than that."""
    given = {"seed": 0, "noise": "own", **{key: value for key, value in spec.items() if key not in ("kind", "digest")}}
    match spec.get("kind"):
        case "Explicit":
            return Explicit(**given)
        case "EvenlySpaced":
            return EvenlySpaced(**given)
    return None


def grids_for_queries(stored: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """The plans by which queries are measured like a store's; none where one of the store's is no grid."""
    grids = [grid_from_spec(spec) for spec in stored]
    if None in grids:
        return []
    return [
        grid if grid.noise == "common" else replace(grid, seed=(grid.seed or 0) + QUERY_SEED)
        for grid in grids
        if grid is not None
    ]


def further(plan: Grid, number: int, num_train_timesteps: int) -> Grid:
    """The plan by which a store that began with another one is measured for the `number`-th time, from 1 on.

    Common noise on even timesteps goes on at timesteps between those that there are, in van der Corput's order of
    offsets: 1/2 of an interval, 1/4, 3/4, 1/8, ... Where these are used up, and for other grids, seeds follow.

    >>> further(EvenlySpaced(4), 2, 1000)
    Explicit(timesteps=(62, 312, 562, 812), draws=1, seed=None, noise='common')
    """
    grids = 1
    if isinstance(plan, EvenlySpaced) and plan.noise == "common":
        grids = max(1, 2 ** int(math.log2(num_train_timesteps / plan.count)) - 1)
    seeds, within = divmod(number - 1, grids)
    again = plan if not seeds else replace(plan, seed=(plan.seed or 0) + seeds)
    if not within or not isinstance(plan, EvenlySpaced):
        return again
    bits = f"{within + 1:b}"
    parts = 2 ** len(bits)
    starts = np.arange(plan.count) * parts + int(bits[::-1], 2)
    steps = starts * num_train_timesteps // (plan.count * parts)
    return Explicit(steps.tolist(), again.draws, again.seed, again.noise)


def _noise_spec(plan: Grid) -> dict[str, Any]:
    """Nothing for seed 0 and for own noise: so were stores described before plans said it."""
    return {
        **({"seed": int(plan.seed)} if plan.seed else {}),
        **({"noise": plan.noise} if plan.noise == "common" else {}),
    }


def _check_noise(plan: Grid) -> None:
    if not isinstance(plan.draws, int) or plan.draws < 1:
        raise ValueError(f"draws must be an integer of 1 or more, got {plan.draws!r}.")
    if plan.seed is not None and not 0 <= plan.seed < 2**63:
        raise ValueError(f"seed must be None or an integer of 0 or more, got {plan.seed}.")
    if plan.noise not in get_args(Noise):
        raise ValueError(f"noise must be one of {get_args(Noise)}, got {plan.noise!r}.")


RECOMMENDED = EvenlySpaced(4)
"""Measured by `benchmarks.measurement`: under common noise four timesteps do what thirty-two do."""
