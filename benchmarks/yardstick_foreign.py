"""Methods of others on the yardstick: D-TRAK's and DAS's published scripts, TRAK's package, dattri."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

import retrac_scale as rs
from benchmarks.yardstick_lab import Lab, damped
from benchmarks.yardstick_methods import DAMPINGS, EVERY, SQUARED, Found, Method
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate.settings import Images
from retrac_scale.projections import TrakProjector
from retrac_scale.task.noising import noising_of

TIMESTEPS = range(0, 1000, 100)
"""Of both scripts at their smaller setting, K = 10."""


def foreign() -> list[Method]:
    """The scripts with a damping by rule and with one that is fitted to half of the subsets, and packages."""
    place = "by place in the batch"
    published = [
        Method("D-TRAK, its authors' script", place, d_trak, "published", fits=True),
        Method("DAS, its authors' script", place, das, "published", forms=(SQUARED,), fits=True),
        Method(
            "TRAK's package, 128 entries", "own", partial(trak_package, 128, None), "published", forms=EVERY, late=True
        ),
        Method(
            "TRAK's package, 4096 entries, our damping",
            "own",
            partial(trak_package, 4096, AUTO),
            "published",
            forms=EVERY,
            late=True,
        ),
    ]
    if find_spec("dattri"):
        published.append(Method("dattri's TRAK, 128 entries", "own", dattri_trak, "published", forms=EVERY, late=True))
    return published


def d_trak(lab: Lab) -> Found:
    """`damped` means of gradients of the mean squared output, 32,768 entries, batches of 52.

    As github.com/sail-sg/D-TRAK has it for CIFAR-2 (grad_unconditional.py, methods/04_if), with our CountSketch in
    place of the first half of 65,536 Gaussian entries.
    """
    started = time.process_time()
    dim, batch = 32768, 52
    features = partial(
        script_features, lab, measure="mean_squared_output", batch=batch, projection=rs.CountSketch(dim), unit=False
    )
    train = features(lab.train)
    scores = {kind: damped(train, features(images), DAMPINGS) for kind, images in lab.queries.items()}
    return Found(scores, len(TIMESTEPS), 4 * dim, time.process_time() - started)


def das(lab: Lab) -> Found:
    """`damped` means of directions of the mean output, times the samples' errors.

    As github.com/Jinxu-Lin/DAS has it for CIFAR-2 (03_grad.py, 04_eval.py, method DAS1squ of 07_score.py), where
    queries and the kernel are of directions too, with 4,096 entries and batches of 16. Errors are of 100 timesteps,
    which 04_eval.py offers besides its 1,000. 07_score.py multiplies errors along the axis of queries, which runs only
    where there are as many queries as samples; here each sample has its own, as in the paper.
    """
    started = time.process_time()
    dim, batch = 4096, 16
    features = partial(
        script_features, lab, measure="mean_output", batch=batch, projection=rs.CountSketch(dim), unit=True
    )
    train, errors = features(lab.train), script_errors(lab)
    scores = {kind: damped(train, features(images), DAMPINGS, errors) for kind, images in lab.queries.items()}
    return Found(scores, len(TIMESTEPS), 4 * dim + 4, time.process_time() - started)


def by_place(shape: Sequence[int], n: int, timestep: int, batch: int) -> Tensor:
    """Noise `[n, *shape]` as both scripts draw it: seeded by the timestep anew for each batch, so that it depends on
    the timestep and on the sample's place in its batch, and one query in `batch` sees a sample's own noise."""
    drawn = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(timestep))
    return drawn[torch.arange(n) % batch]


def script_features(lab: Lab, images: Images, *, measure: str, batch: int, projection: Any, unit: bool) -> Any:
    """Means over `TIMESTEPS` of sketched gradients, or of their directions, float64 `[n, k]`."""
    task, n = lab.task(measure), len(images)
    task.load("last", next(iter(lab.last.values())))
    sketcher = rs.GradientSketcher(task.model, projection)
    total: Any = 0
    for timestep in TIMESTEPS:
        steps, noise, found = torch.full((n,), timestep), by_place(images.images.shape[1:], n, timestep, batch), []
        for rows in torch.split(torch.arange(n), 64):
            given = {name: values[rows] for name, values in images.given.items()}
            with sketcher:
                sketch, norm = sketcher(task.measured(images.images[rows], steps[rows], noise[rows], given)[0][0])
            found.append(sketch / (norm[:, None] + 1e-8) if unit else sketch)
        total = total + torch.cat(found).double().numpy()
    return total / len(TIMESTEPS)


def script_errors(lab: Lab, timesteps: int = 100, batch: int = 256) -> Any:
    """Means over timesteps of root mean squared errors, which are first divided by their length, `[n]`."""
    task, n, images = lab.task(), len(lab.train), lab.train
    task.load("last", next(iter(lab.last.values())))
    squared = []
    with torch.no_grad():
        for timestep in range(0, 1000, 1000 // timesteps):
            noise = by_place(images.images.shape[1:], n, timestep, batch)
            losses = task.losses(images.images, torch.full((n,), timestep), noise, images.given)
            squared.append(losses.double().numpy())
    roots = np.sqrt(np.stack(squared, 1))
    return (roots / (np.linalg.norm(roots, axis=1, keepdims=True) + 1e-8)).mean(1)


class MeanLoss(AbstractModelOutput):  # type: ignore[misc]
    """A sample's training loss, averaged over the (timestep, noise) pairs that come with it."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler

    def get_output(
        self, model: Any, weights: Any, buffers: Any, image: Tensor, steps: Tensor, noise: Tensor, *given: Tensor
    ) -> Tensor:
        """The mean loss of a sample `[...]` at steps `[t]` under noise `[t, ...]`."""
        return mean_loss(model, self.scheduler, (weights, buffers), image, steps, noise, *given)

    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
        """1: the output is the loss."""
        return torch.ones(len(batch[0]), 1)


def mean_loss(
    model: Any, scheduler: Any, weights: Any, image: Tensor, steps: Tensor, noise: Tensor, *given: Tensor
) -> Tensor:
    """Of one sample, for `vmap`."""
    noising, images = noising_of(scheduler, model), image.expand(len(steps), *image.shape)
    noisy, target = noising.noisy(images, noise, steps), noising.target(images, noise, steps)
    told = [value.expand(len(steps), *value.shape) for value in given]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel knows no vmap
        predicted = torch.func.functional_call(model, weights, (noisy, noising.times(steps), *told)).sample
    loss: Tensor = (predicted - target).square().mean()
    return loss


def loaded(lab: Lab, images: Images, seed: int, timesteps: int = 10) -> list[Tensor]:
    """Images with timesteps `[n, t]` and noise of their own `[n, t, ...]`, that `EvenlySpaced(t, noise="own")` has."""
    ids = np.asarray(images.ids)
    table = rs.EvenlySpaced(timesteps, noise="own", seed=seed).pairs("", ids, lab.task().num_train_timesteps).timesteps
    shape = images.images.shape[1:]
    noise = torch.stack([rs.draw_noise(shape, ids, steps, seed) for steps in table.T], 1)
    return [images.images, torch.from_numpy(table), noise, *images.given.values()]


def trak_package(dim: int, damping: float | None, lab: Lab) -> Found:
    """github.com/MadryLab/trak with the loss as model output, our CountSketch as projector, as its own is slow on CPUs.

    Without a damping its ridge is what it is by default, none, which needs fewer entries than samples.
    """
    started = time.process_time()
    model, train = lab.model, loaded(lab, lab.train, 0)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model,
            MeanLoss(lab.scheduler),
            train_set_size=len(lab.train),
            save_dir=folder,
            projector=TrakProjector(rs.CountSketch(dim), shapes),
            device="cpu",
            use_half_precision=False,
            logging_level="ERROR",
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in batches(train):
            traker.featurize(batch, num_samples=len(batch[0]))
        if damping is not None:
            found = np.asarray(traker.saver.current_store["grads"])
            traker.score_computer.lambda_reg = damping * float(np.square(found).sum()) / min(found.shape)
        traker.finalize_features()
        for kind, images in lab.queries.items():
            name = kind.replace(" ", "-")
            traker.start_scoring_checkpoint(name, model.state_dict(), model_id=0, num_targets=len(images))
            for batch in batches(loaded(lab, images, 1)):
                traker.score(batch, num_samples=len(batch[0]))
            scores[kind] = np.array(traker.finalize_scores(name)).T.astype(np.float64)
    return Found(scores, train[1].shape[1], 4 * dim, time.process_time() - started)


def batches(tensors: list[Tensor], size: int = 16) -> list[tuple[Tensor, ...]]:
    """Of all tensors together."""
    return list(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True))


def dattri_trak(lab: Lab) -> Found:
    """github.com/TRAIS-Lab/dattri: its TRAK with its own projection and no regularisation, as by default."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    def loss(weights: Any, data: Any) -> Tensor:
        return mean_loss(lab.model, lab.scheduler, weights, *data)

    def loader(images: Images, seed: int) -> Any:
        data = torch.utils.data.TensorDataset(*loaded(lab, images, seed))
        return torch.utils.data.DataLoader(data, batch_size=16)

    started = time.process_time()
    dim = 128
    attributor = TRAKAttributor(
        AttributionTask(loss, lab.model, lab.model.state_dict()),
        correct_probability_func=lambda *_: torch.zeros(()),
        projector_kwargs={"proj_dim": dim, "proj_max_batch_size": 16, "device": "cpu"},
    )
    attributor.cache(loader(lab.train, 0))
    scores = {
        kind: attributor.attribute(loader(images, 1)).detach().T.double().numpy()
        for kind, images in lab.queries.items()
    }
    return Found(scores, 10, 4 * dim, time.process_time() - started)
