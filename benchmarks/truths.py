"""Ground truths: what many models, each trained on a random half of the images, make of some queries.

    python -m benchmarks.truths --setting digits8
    python -m benchmarks.truths --setting emoji16 --folder FOLDER     # of emoji tarballs, see benchmarks.emoji
    python -m benchmarks.truths --setting digits8 --subsets 64 --work WORK

trains what is missing, one model after the other on one thread, and writes benchmarks/truths/SETTING.npz: members
`[m, n]`, losses `[m, q]` of every kind of query. Stopped, it goes on where it was. All trainings share one seed: order,
timesteps and noise of a sample in an epoch are the same in each, so that models differ by their samples alone.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from benchmarks import emoji
from benchmarks.paper_data import Images, digits, joined
from benchmarks.paper_models import DEVICE, Trainer, Training, generate
from retrac_scale import evaluate

HERE = Path(__file__).parent
QUERIES = 64
"""Of each kind: held out, trained on, generated."""
LOSS_TIMESTEPS, LOSS_DRAWS = 50, 2


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images to train on and some held out, with what is known of each, {column: `[n]`}."""

    train: Images
    held_out: Images
    columns: dict[str, Any] = field(default_factory=dict)
    held_out_columns: dict[str, Any] = field(default_factory=dict)


def digits8(_: Path | None) -> Pictures:
    """512 of scikit-learn's 8 x 8 digits to train on."""
    data = digits()
    return Pictures(data.train.some(slice(512)), data.validation.some(slice(QUERIES), "held-out"))


def emoji16(folder: Path | None) -> Pictures:
    """768 pictures of 416 emoji by two designers to train on, 64 held out, 16 x 16 in colour."""
    if folder is None:
        raise ValueError("emoji16 needs --folder with the tarballs; see benchmarks/emoji.py.")
    found = emoji.load(folder, 16)
    rng = np.random.default_rng(0)
    pairs = rng.permutation(len(found.pictures) // 2)[:416]
    rows = rng.permutation(np.concatenate([2 * pairs, 2 * pairs + 1]))
    pixels = torch.from_numpy(found.pictures[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
    known = {"designer": found.designer[rows], "name": found.name[rows], "category": found.category[rows]}
    return Pictures(
        Images(pixels[:768]),
        Images(pixels[768:], "held-out"),
        {name: values[:768] for name, values in known.items()},
        {name: values[768:] for name, values in known.items()},
    )


@dataclass(frozen=True)
class Setting:
    """A data set and how models are trained on it."""

    load: Callable[[Path | None], Pictures]
    training: Training
    seed: int = 0


SETTINGS = {
    "digits8": Setting(digits8, Training()),
    "emoji16": Setting(emoji16, Training(epochs=60, kept=(15, 30, 45, 60), channels=(24, 48))),
}


@dataclass(frozen=True, eq=False)
class Losses:
    """`losses(weights)`: the loss of each query, `[q]`, over the middles of 50 intervals and two noises of its own."""

    images: Images
    training: Training

    @property
    def key(self) -> str:
        """A digest of the queries."""
        digest = hashlib.blake2b(digest_size=12)
        digest.update(self.images.images.numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, weights: dict[str, Any]) -> Any:
        """Means over timesteps and noises, float64."""
        shape, ids = self.images.images.shape[1:], np.arange(len(self.images))
        task = rs.DiffusionTask(self.training.build(shape), self.training.scheduler(), device=DEVICE)
        task.load("measured", weights)
        width = task.num_train_timesteps / LOSS_TIMESTEPS
        total = torch.zeros(len(ids), dtype=torch.float64)
        with torch.no_grad():
            for step in ((np.arange(LOSS_TIMESTEPS) + 0.5) * width).astype(np.int64):
                steps = np.full(len(ids), step)
                for draw in range(LOSS_DRAWS):
                    noise = rs.draw_noise(shape, ids, steps, 0, draw=draw)
                    total += task.losses(self.images.images, torch.from_numpy(steps), noise, {}).cpu()
        return (total / (LOSS_TIMESTEPS * LOSS_DRAWS)).numpy()


class Truth:
    """A setting's model, queries and retrained models; made once and kept in a folder."""

    def __init__(self, name: str, folder: Path | None, work: Path) -> None:
        self.name, self.setting, self.work = name, SETTINGS[name], work / name
        self.pictures = self.setting.load(folder)
        self.trainer = Trainer(self.pictures.train, self.setting.training, self.work / "models")
        self.ids = np.arange(len(self.pictures.train))

    @cached_property
    def checkpoints(self) -> dict[str, Any]:
        """{epoch: weights} of the model that is asked about."""
        return self.trainer.checkpoints(self.ids, self.setting.seed, self.record)

    @property
    def record(self) -> Path:
        """The folder of its training record."""
        return self.work / "record"

    def build(self) -> Any:
        """An untrained model."""
        return self.setting.training.build(self.pictures.train.images.shape[1:])

    @cached_property
    def queries(self) -> dict[str, Images]:
        """64 images of each kind."""
        asked = self.pictures.held_out
        last = list(self.checkpoints.values())[-1]
        return {
            "held out": asked,
            "training": self.pictures.train.some(slice(QUERIES), "training"),
            "generated": generate(self.setting.training, self.build(), last, asked, self.work / "generated.pt"),
        }

    def retrained(self, subsets: int) -> tuple[Any, dict[str, Any]]:
        """Members `[m, n]` of half-size subsets and the losses `[m, q]` of each kind of query."""
        members = evaluate.random_subsets(len(self.ids), subsets, seed=self.setting.seed)
        measure = Losses(joined(list(self.queries.values())), self.setting.training)
        chosen = [self.ids[row] for row in members]
        losses = evaluate.retrain(
            chosen, self.trainer, measure, self.work / "subsets", seed=self.setting.seed, key=measure.key
        )
        return members, dict(zip(self.queries, np.split(losses, len(self.queries), axis=1), strict=True))


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--subsets", type=int, default=32, help="how many models are retrained (default: 32)")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / ".cache" / "truths",
        help="folder for models (default: benchmarks/.cache/truths)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth = Truth(arguments.setting, arguments.folder, arguments.work)
    started = time.perf_counter()
    members, losses = truth.retrained(arguments.subsets)
    out = HERE / "truths" / f"{truth.name}.npz"
    out.parent.mkdir(exist_ok=True)
    packed = {kind.replace(" ", "_"): values.astype(np.float32) for kind, values in losses.items()}
    np.savez_compressed(out, members=np.packbits(members, axis=1), **packed)
    print(f"{out}: {len(members)} models, {time.perf_counter() - started:.0f} s in this run")


if __name__ == "__main__":
    main()
