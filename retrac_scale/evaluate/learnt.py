"""Whether a store's losses are those of a model that predicts something."""

from __future__ import annotations

import math
from typing import NamedTuple

from retrac_scale.arrays import Float64
from retrac_scale.store import SketchStore
from retrac_scale.store.part import measures_in
from retrac_scale.task.measures import OUTPUTS


class Part(NamedTuple):
    """A part of the timesteps, from more to more noise."""

    name: str
    first: float
    last: float


class Sign(NamedTuple):
    """Where the mean loss of a trained model is clearly below a figure, and what predicting zeros has there."""

    part: Part
    most: float
    of_zeros: str
    compared: Part | None = None
    """A part whose mean loss the figure is a share of."""


FIRST, MIDDLE = Part("first quarter", 0, 0.25), Part("middle half", 0.25, 0.75)
LATER, LAST = Part("later half", 0.5, 1), Part("last quarter", 0.75, 1)
SIGNS = {
    "epsilon": (Sign(LATER, 0.5, "1"), Sign(LAST, 0.5, "1")),
    "v_prediction": (Sign(FIRST, 0.75, "nearly 1"), Sign(LAST, 1, "1 at most")),
    "sample": (Sign(FIRST, 0.75, "1", LAST), Sign(LAST, 1, "1 at most")),
    "e - x": (Sign(MIDDLE, 0.9, "more than 1"),),
    "x - e": (Sign(MIDDLE, 0.9, "more than 1"),),
}
"""By prediction. With m the mean square of x, 1 at most, zeros have 1 for e, a + (1 - a) m for v, 1 + m for e - x."""


def unlearnt(store: SketchStore) -> str:
    """What the losses say of a checkpoint that predicts no better than zeros; empty where all do, or it is not known.

    Mean squares and magnitudes of errors tell, others and weighted ones do not.
    """
    measures = set(measures_in(store.fingerprint))
    squares = measures <= {"mse", *OUTPUTS}
    if not (squares or measures == {"l1"}) or not (store.has("loss") and store.has("timestep")):
        return ""
    scheduler = store.fingerprint["scheduler"]
    noising = (store.fingerprint.get("forward") or {}).get("noising", f" -> {scheduler.get('prediction_type')}")
    kind = next((kind for kind in SIGNS if noising.partition(" -> ")[2].startswith(kind)), "")
    for name in store.checkpoints:
        losses = store.losses(name).astype(float)
        losses = losses if squares else losses**2 * math.pi / 2  # the squares of normal errors of such magnitude
        shares = store.timesteps(name) / scheduler["num_train_timesteps"]
        for part, most, of_zeros, compared in SIGNS.get(kind, ()):
            found = _mean(losses, shares, part) / (1 if compared is None else _mean(losses, shares, compared))
            if found > most:
                return (
                    f"checkpoint {name} has learnt little, or to predict something else than {kind}: its mean loss on "
                    f"these images is {found:.2g}{'' if compared is None else f' of that in the {compared.name}'} in "
                    f"the {part.name} of timesteps, where predicting zeros has {of_zeros}; give the weights that the "
                    "training ended with, averaged if it kept such, and the scheduler that it used"
                )
    return ""


def _mean(losses: Float64, shares: Float64, part: Part) -> float:
    """Over a part of the timesteps; NaN, which is above no figure, where none was measured."""
    inside = (part.first <= shares) & (shares < part.last)
    return float(losses[inside].mean()) if inside.any() else math.nan
