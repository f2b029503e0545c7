"""What sketches are a function of: the fingerprint of a store, and of each of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrac_scale.arrays import Ids
from retrac_scale.projections import GradientSketcher, Projection
from retrac_scale.projections.preconditioning import digest_of
from retrac_scale.sketching.request import Request
from retrac_scale.store import SketchStore
from retrac_scale.store.compatibility import check_compatible
from retrac_scale.task.items import brought
from retrac_scale.task.noising import scheduler_spec
from retrac_scale.task.timesteps import Pairs, TimestepPlan, plan_digest


@dataclass(frozen=True, eq=False)
class Described:
    """What sketches are a function of.

    Attributes:
        fingerprint: of all samples and checkpoints, under the first measure.
        timesteps: the plan.
        num_train_timesteps: of the scheduler.
    """

    fingerprint: dict[str, Any]
    timesteps: TimestepPlan
    num_train_timesteps: int

    def part(self, measure: str, ids: Ids, checkpoints: Sequence[str]) -> dict[str, Any]:
        """The fingerprint of some samples at some checkpoints under a measure."""
        pairs = {name: self.timesteps.pairs(name, ids, self.num_train_timesteps) for name in checkpoints}
        by_name = {key: self.fingerprint[key] for key in ("checkpoints", "precondition") if key in self.fingerprint}
        return {
            **self.fingerprint,
            **{key: {name: value[name] for name in checkpoints} for key, value in by_name.items()},
            "measure": measure,
            "timesteps": {**self.timesteps.spec(), "digest": plan_digest(pairs)},
        }

    def check_like(self, like: SketchStore, measures: Sequence[str]) -> None:
        """Raise ValueError unless sketches under each measure can be compared with those of another store."""
        held, names = like.measurements, list(self.fingerprint["checkpoints"])
        for measure in measures:
            there = {**like.fingerprint, **({"measure": measure} if measure in held else {})}
            check_compatible(there, like.checkpoints, {**self.fingerprint, "measure": measure}, names)


def describe(
    request: Request,
    timesteps: TimestepPlan,
    pairs: Mapping[str, Pairs],
    projection: Projection,
    sketcher: GradientSketcher,
) -> Described:
    """What the sketches of a request are a function of; loads every checkpoint into the model."""
    task = request.task
    fingerprint: dict[str, Any] = {
        "projection": projection.spec(),
        "parameters": {name: list(shape) for name, shape in sketcher.shapes.items()},
        "checkpoints": {name: task.load(name, checkpoint) for name, checkpoint in request.checkpoints.items()},
        "scheduler": scheduler_spec(task.scheduler),
        "measure": task.measure,
        "forward": task.forward,
        "autocast": task.autocast,
        "timesteps": {**timesteps.spec(), "digest": plan_digest(pairs)},
    }
    if frozen := {**task.frozen, **(brought(request.dataset, "frozen") or {})}:
        fingerprint["frozen"] = frozen
    asked = {name: brought(request.dataset, name) for name in ("region", "concept")}
    fingerprint |= {name: words for name, words in asked.items() if words}
    if request.precondition:
        fingerprint["precondition"] = {name: digest_of(own) for name, own in request.precondition.items()}
    return Described(fingerprint, timesteps, task.num_train_timesteps)
