"""A setting: data, a model trained on them, and the images that it is asked about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrac_scale.evaluate.judging.base import FOLDER, Truth
from retrac_scale.evaluate.settings.data import Pictures
from retrac_scale.evaluate.settings.images import Images, joined
from retrac_scale.evaluate.settings.trainer import Trainer
from retrac_scale.evaluate.settings.training import Training
from retrac_scale.task.checkpoints import load_checkpoint

QUERIES = FOLDER / "queries"
"""Of each setting, as a file."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Data, a model trained on them, and queries; what must be trained is trained when it is first asked for, and kept.

    Attributes:
        name: of the setting.
        pictures: training and held-out images with their columns.
        training: how the model is trained: architecture, scheduler, epochs.
        work: folder for weights and the training record.
        seed: of the model that is asked about.
        base: how the model was trained that a fine-tune goes on from; None without a fine-tune.
        asked_in: folder of the file of queries.
    """

    name: str
    pictures: Pictures
    training: Training
    work: Path
    seed: int = 0
    base: Training | None = None
    asked_in: Path = QUERIES

    @property
    def train(self) -> Images:
        """The training set: a torch dataset that `sketch` takes, with what the model is told of each in `.given`."""
        return self.pictures.train

    @property
    def images(self) -> Tensor:
        """Pixels of the training set in -1 .. 1, float32 `[n, c, size, size]`."""
        return self.train.images

    @property
    def ids(self) -> Any:
        """Of the training set, 0 .. n-1."""
        return np.arange(len(self.train))

    @property
    def columns(self) -> Mapping[str, Any]:
        """What is known of the training set, {name: `[n]`}."""
        return self.pictures.columns

    @cached_property
    def queries(self) -> dict[str, Images]:
        """The images that are asked about, by kind: the same for everybody, read from a file of the package.

        Raises:
            ValueError: the data are not those that the queries were made with.
        """
        if not self.queries_file.exists():
            raise ValueError(f"{self.name} has no queries yet; `python -m benchmarks.truths` makes them.")
        with np.load(self.queries_file) as file:
            packed = dict(file)
        made_with = str(packed.pop("data"))
        if made_with != self.pictures.digest:
            raise ValueError(
                f"the data of {self.name} have digest {self.pictures.digest}, the truths were made with {made_with}; "
                "another version of scikit-learn, Pillow or of the pictures?"
            )
        found = {}
        for kind in (name for name in packed if "/" not in name):
            told = {name.split("/")[1]: values for name, values in packed.items() if name.startswith(f"{kind}/")}
            given = {name: torch.from_numpy(values) for name, values in told.items()}
            found[kind] = Images(torch.from_numpy(packed[kind]), kind.replace(" ", "-"), given)
        return found

    @property
    def queries_file(self) -> Path:
        """Where they are kept."""
        return self.asked_in / f"{self.name}.npz"

    def asked(self, truth: Truth) -> Images:
        """The queries of a truth, in the order of the rows of its scores."""
        return joined([self.queries[kind] for kind in truth.kinds])

    @cached_property
    def checkpoints(self) -> dict[str, Any]:
        """{epoch: weights} of the model that is asked about."""
        if self.base is None:
            return self.trainer.checkpoints(self.ids, self.seed, self.record)
        last = self.trainer(self.pictures.tuned, self.seed)
        return {f"epoch-{self.training.kept[-1]:03d}": last}

    @property
    def record(self) -> Path:
        """The folder of its training record, there once `checkpoints` is; a fine-tune has none."""
        return self.work / "record"

    @cached_property
    def trainer(self) -> Trainer:
        """`trainer(ids, seed)` trains as the model that is asked about was trained, on some of the samples."""
        if self.base is None:
            return Trainer(self.train, self.training, self.work / "models", progress=True)
        first = Trainer(self.train, self.base, self.work / "base", progress=True)
        start = first(np.setdiff1d(self.ids, self.pictures.tuned), self.seed)
        return Trainer(self.train, self.training, self.work / "models", start, progress=True)

    @cached_property
    def model(self) -> Any:
        """The model that is asked about, with its last weights."""
        model = self.build()
        load_checkpoint(model, "last", list(self.checkpoints.values())[-1])
        return model.eval()

    @property
    def scheduler(self) -> Any:
        """A scheduler as in training."""
        return self.training.scheduler()

    def build(self, seed: int = 0) -> Any:
        """A model as its training begins with: untrained, or what a fine-tune goes on from."""
        return self.trainer.build(seed)


def cache() -> Path:
    """The folder for trained models where none is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrac_scale"
