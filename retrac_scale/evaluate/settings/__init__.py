"""Settings that anyone can have: small data, models of minutes, and the queries of the truths.

A setting is named here by what it is trained on and how; everything else follows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from retrac_scale.evaluate.settings import data
from retrac_scale.evaluate.settings.base import Setting, cache
from retrac_scale.evaluate.settings.images import Images, joined
from retrac_scale.evaluate.settings.training import AdapterTraining, ClassTraining, DiTTraining, Training

__all__ = ["SETTINGS", "Images", "Recipe", "Setting", "joined", "setting"]


@dataclass(frozen=True)
class Recipe:
    """What a setting is trained on, and how."""

    load: Callable[[Path | None], data.Pictures]
    training: Training
    base: Training | None = None


EMOJI = Training(epochs=60, kept=(15, 30, 45, 60), channels=(24, 48))
TUNED = Training(epochs=1200, kept=(1200,), learning_rate=1e-3, channels=EMOJI.channels)
SETTINGS = {
    "digits8": Recipe(data.digits8, Training()),
    "emoji16": Recipe(data.emoji16, EMOJI),
    "shapes16": Recipe(data.shapes16, ClassTraining(epochs=60, kept=(15, 30, 45, 60))),
    "planted16": Recipe(data.planted16, EMOJI),
    "tones16": Recipe(data.tones16, EMOJI),
    "exemplars16": Recipe(data.exemplars16, TUNED, base=EMOJI),
    "adapters16": Recipe(
        data.exemplars16,
        AdapterTraining(TUNED.epochs, TUNED.kept, learning_rate=2e-3, channels=TUNED.channels),
        base=EMOJI,
    ),
    "classes16": Recipe(data.emoji16classes, ClassTraining(epochs=60, kept=(15, 30, 45, 60), channels=(24, 48))),
    "flow16": Recipe(data.emoji16classes, DiTTraining(epochs=100, kept=(25, 50, 75, 100), learning_rate=1e-3)),
}


def setting(
    name: str, *, folder: str | os.PathLike[str] | None = None, work: str | os.PathLike[str] | None = None
) -> Setting:
    """Everything that goes with the truths of a setting: images, ids, columns, model, checkpoints, queries.

    Data and queries are there at once and the same everywhere, bit for bit. The model is trained on one thread when
    `checkpoints` or `model` is first asked for, which takes minutes, and kept; on another machine its weights differ
    by what rounding makes of a training.

    Args:
        name: one of `retrac_scale.evaluate.settings.SETTINGS`: digits8 or emoji16, say.
        folder: of the two emoji tarballs, where the setting needs them (`settings.emoji` says how to get them).
        work: folder for what is trained; default retrac_scale in the user's cache folder. A setting has its own in it.

    Raises:
        ValueError: there is no such setting, or it needs a folder.
        FileNotFoundError: the folder does not hold the data; says how to get them.
    """
    if name not in SETTINGS:
        raise ValueError(f"there is no setting {name!r}; there are: {', '.join(SETTINGS)}.")
    recipe = SETTINGS[name]
    pictures = recipe.load(None if folder is None else Path(folder).expanduser())
    place = (cache() if work is None else Path(work).expanduser()) / name
    return Setting(name, pictures, recipe.training, place, base=recipe.base)
