"""Training the models of the settings: those of one seed differ by their samples alone."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from retrac_scale.evaluate.settings.images import Images
from retrac_scale.evaluate.settings.training import DEVICE, Training
from retrac_scale.task.checkpoints import load_checkpoint
from retrac_scale.task.noising import noising_of
from retrac_scale.task.timesteps import draw_noise
from retrac_scale.training.recorder import TrainingRecorder


@dataclass(frozen=True, eq=False)
class Trainer:
    """`trainer(ids, seed)`: the weights of a model trained on some of the images; what was trained once is kept.

    Order, timesteps and noise of a sample in an epoch depend on the seed, the epoch and the sample, not on what else is
    in the training set: models of the same seed differ by the samples that they saw. Training takes one thread.

    Attributes:
        images: of which some are trained on.
        training: how.
        folder: for weights.
        start: weights to go on from, in place of fresh ones; with others, give another folder.
        progress: show a bar over epochs.
    """

    images: Images
    training: Training
    folder: Path
    start: Mapping[str, Tensor] | None = None
    progress: bool = False

    def build(self, seed: int = 0) -> Any:
        """A model as training begins with; without dropout, so that models differ by their samples alone."""
        model = self.training.build(self.images.images.shape[1:], seed)
        if self.start is not None:
            load_checkpoint(model, "start", self.start)
        return self.training.adapted(model, seed).eval()

    def __call__(self, ids: Any, seed: int) -> dict[str, Tensor]:
        """The last weights."""
        return self.checkpoints(ids, seed)[f"epoch-{self.training.kept[-1]:03d}"]

    def checkpoints(self, ids: Any, seed: int, record: Path | None = None) -> dict[str, dict[str, Tensor]]:
        """Weights at the kept epochs, and the training record in a folder; without one, the last weights alone."""
        file = self._file(ids, seed, record is not None)
        if not file.exists():
            with one_thread():
                kept = self._train(np.sort(np.asarray(ids)), seed, record)
            save(dict([list(kept.items())[-1]]), self._file(ids, seed, False))
            if record is not None:
                save(kept, file)
        loaded: dict[str, dict[str, Tensor]] = torch.load(file, weights_only=True)
        return loaded

    def _file(self, ids: Any, seed: int, recorded: bool) -> Path:
        listed = repr((self.training, seed, np.asarray(ids).tolist(), recorded)).encode()
        return self.folder / f"{hashlib.blake2b(listed, digest_size=12).hexdigest()}.pt"

    def _train(self, ids: Any, seed: int, record: Path | None) -> dict[str, dict[str, Tensor]]:
        how, noising, images = self.training, self.training.scheduler(), self.images.images
        model = self.build(seed)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=how.learning_rate, weight_decay=0, fused=True)
        process = noising_of(noising, model)
        if record is not None:  # of a training that was interrupted
            shutil.rmtree(record, ignore_errors=True)
        recorder = None if record is None else TrainingRecorder(record, len(images), noising)
        batches = -(-len(ids) // how.batch)
        kept: dict[str, dict[str, Tensor]] = {}
        for epoch in tqdm(range(1, how.epochs + 1), desc="train", unit="epoch", disable=not self.progress):
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(len(images))
            steps_of = rng.integers(0, noising.config.num_train_timesteps, len(images))
            for number, batch in enumerate(np.array_split(order[np.isin(order, ids)], batches)):
                step = (epoch - 1) * batches + number
                rate = how.learning_rate * min(1, (step + 1) / how.warmup_steps) * (1 - step / (how.epochs * batches))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                timesteps, noise_seed = torch.from_numpy(steps_of[batch]), seed * how.epochs + epoch
                noise = draw_noise(images.shape[1:], batch, timesteps, noise_seed)
                noisy, times = process.noisy(images[batch], noise, timesteps), process.times(timesteps)
                told = {name: values[batch].to(DEVICE) for name, values in self.images.given.items()}
                predicted = model(noisy.to(DEVICE), times.to(DEVICE), **told).sample
                loss = F.mse_loss(predicted, process.target(images[batch], noise, timesteps).to(DEVICE))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                if recorder is not None:
                    recorder.step(batch, timesteps, noise_seed, rate)
            if epoch in how.kept:
                name = f"epoch-{epoch:03d}"
                kept[name] = {key: value.detach().cpu().clone() for key, value in trained.items()}
                if recorder is not None:
                    recorder.checkpoint(name)
        return kept


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums of several are in another order, which a training makes visible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save(value: Any, file: Path) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(value, partial)
    os.replace(partial, file)
