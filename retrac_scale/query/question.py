"""Question: what is asked of an index."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, get_args

import numpy.typing as npt

from retrac_scale.query.topk import Duplicates, Reduce, Side

if TYPE_CHECKING:
    from retrac_scale.sketching.samples import Samples


NO_SAMPLES = "rerank computes full gradients: give the queries as rs.Samples(...), not as a store."


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of an index, see `Index.query`."""

    k: int
    side: Side
    where: npt.ArrayLike | str | None
    group_by: str | npt.ArrayLike | None
    reduce: Reduce
    exclude_self: bool
    rerank: int | None = None
    train: Samples | None = None
    duplicates: Duplicates | float = "keep"
    together: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k must be an integer of 1 or more, got {self.k!r}.")
        for name, value, kinds in (("side", self.side, Side), ("reduce", self.reduce, Reduce)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}.")
        if isinstance(self.duplicates, str):
            if self.duplicates not in get_args(Duplicates):
                raise ValueError(f"duplicates must be 'keep', 'fold' or a likeness, got {self.duplicates!r}.")
        elif not 0 < self.duplicates <= 1:
            raise ValueError(f"duplicates must be 'keep', 'fold' or a likeness in 0 .. 1, got {self.duplicates!r}.")
        if self.rerank is None:
            return
        if self.together:
            raise ValueError("rerank takes queries one by one; leave out together= or rerank=.")
        if self.train is None:
            raise ValueError(
                "rerank computes full gradients: give the training samples as train=rs.Samples(dataset, task, "
                "checkpoints, timesteps)."
            )
        if self.group_by is not None:
            raise ValueError("rerank orders samples, not groups; leave out group_by= or rerank=.")
        if self.rerank < self.k:
            raise ValueError(f"rerank must be at least k = {self.k}, got {self.rerank}.")

    @property
    def signs(self) -> tuple[int, ...]:
        """1 for proponents, -1 for opponents."""
        return {"proponents": (1,), "opponents": (-1,), "both": (1, -1)}[self.side]
