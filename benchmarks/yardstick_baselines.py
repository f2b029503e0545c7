"""Scores without gradients on the yardstick, and scores that must fall to zero."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs
from benchmarks.yardstick_lab import Lab, Scores, damped, forward_features, scored
from benchmarks.yardstick_methods import BOTH, DAMPINGS, EVERY, LOSS, Found, Method, estimated
from retrac_scale.estimators import Estimator

Features = Mapping[str, Any]
"""{"train" or kind of query: `[n, t, k]`}."""


def baselines() -> list[Method]:
    """What a table of attribution needs beside it."""
    return [
        Method("random", "-", chance, "baseline"),
        Method("mean loss of the sample", "common", mean_loss, "baseline"),
        Method("pixels, inner product", "-", partial(pixels, inner), "baseline"),
        Method("pixels, centred cosine", "-", partial(pixels, centred_cosine), "baseline"),
        Method("pixel ridge", "-", partial(pixels, ridge), "baseline", forms=EVERY),
        Method("self-supervised features, centred cosine", "-", partial(contrastive, centred_cosine), "baseline"),
        Method("self-supervised features, ridge", "-", partial(contrastive, ridge), "baseline", forms=EVERY),
        Method("outputs, same ridge", "common", partial(forward, "outputs"), "baseline", forms=EVERY),
        Method(
            "middle activations, same ridge", "common", partial(forward, "middle activations"), "baseline", forms=EVERY
        ),
        Method("middle activations, damping fitted", "common", fitted_activations, "baseline", EVERY, True, False),
    ]


def sanity() -> list[Method]:
    """The loss of wrong models, and its scores of wrong samples and queries."""
    return [
        Method(f"{LOSS}, the model before training", "common", partial(untrained, 0), "sanity", BOTH),
        Method(f"{LOSS}, an untrained model of another seed", "common", partial(untrained, 1), "sanity"),
        Method(f"{LOSS}, another seed's model", "common", other_seed, "sanity", late=True),
        Method(f"{LOSS}, samples shuffled", "common", partial(shuffled, 1), "sanity"),
        Method(f"{LOSS}, queries shuffled", "common", partial(shuffled, 0), "sanity"),
    ]


def chance(lab: Lab) -> Found:
    """Standard normal numbers."""
    rng = np.random.default_rng(0)
    return Found({kind: rng.standard_normal((len(x), len(lab.train))) for kind, x in lab.queries.items()}, 0, 0, 0.0)


def mean_loss(lab: Lab) -> Found:
    """The training sample's loss at four timesteps under common noise, whatever the query."""
    started, task, n = time.process_time(), lab.task(), len(lab.train)
    task.load("last", next(iter(lab.last.values())))
    steps = rs.EvenlySpaced(4).pairs("", np.arange(1), task.num_train_timesteps).timesteps[0]
    shape, total = lab.train.images.shape[1:], torch.zeros(n)
    with torch.no_grad():
        for step in steps:
            times = torch.full((n,), int(step))
            noise = rs.draw_noise(shape, None, times, 0)
            total += task.losses(lab.train.images, times, noise, lab.train.given)
    scores = {kind: np.tile(total.double().numpy() / len(steps), (len(x), 1)) for kind, x in lab.queries.items()}
    return Found(scores, len(steps), 4, time.process_time() - started)


def pixels(compare: Callable[[Lab, Features], Scores], lab: Lab) -> Found:
    """Of the images themselves."""
    started = time.process_time()
    features = {kind: images.images.flatten(1).double().numpy()[:, None] for kind, images in everything(lab).items()}
    scores = compare(lab, features)
    return Found(scores, 0, features["train"].shape[2], time.process_time() - started)


def contrastive(compare: Callable[[Lab, Features], Scores], lab: Lab) -> Found:
    """Of a small net's features, trained on the training images without labels."""
    started = time.process_time()
    net = simclr(lab.train.images)
    with torch.no_grad():
        features = {kind: net(images.images).double().numpy()[:, None] for kind, images in everything(lab).items()}
    scores = compare(lab, features)
    return Found(scores, 0, 4 * features["train"].shape[2], time.process_time() - started)


def forward(name: str, lab: Lab) -> Found:
    """Of what the model computes anyway under common noise, with the recipe's ridge."""
    started = time.process_time()
    features = forward_features(lab.model, lab.scheduler, everything(lab))[name]
    scores = answered(lab, features, rs.ReTracRidge(), "int8")
    _, t, k = features["train"].shape
    return Found(scores, t, t * k, time.process_time() - started)


def fitted_activations(lab: Lab) -> Found:
    """The ridge over directions of the middle activations, at all dampings."""
    started = time.process_time()
    features = forward_features(lab.model, lab.scheduler, everything(lab))["middle activations"]
    unit = {kind: x.astype(np.float64) / np.linalg.norm(x, axis=2, keepdims=True) for kind, x in features.items()}
    _, t, k = unit["train"].shape
    scores = {
        kind: sum(damped(unit["train"][:, at], unit[kind][:, at], DAMPINGS) for at in range(t)) for kind in lab.queries
    }
    return Found(scores, t, 4 * t * k, time.process_time() - started)


def everything(lab: Lab) -> dict[str, Any]:
    """The training images with the queries."""
    return {"train": lab.train, **lab.queries}


def inner(lab: Lab, features: Features) -> Scores:
    """Inner products of features `[n, 1, k]`."""
    return {kind: features[kind][:, 0] @ features["train"][:, 0].T for kind in lab.queries}


def centred_cosine(lab: Lab, features: Features) -> Scores:
    """Cosines of features `[n, 1, k]` after the mean of the training samples is taken away."""
    mean = features["train"].mean(0)
    centred = {kind: x - mean for kind, x in features.items()}
    return inner(lab, {kind: x / np.linalg.norm(x, axis=2, keepdims=True) for kind, x in centred.items()})


def ridge(lab: Lab, features: Features) -> Scores:
    """TRAK's formula over features `[n, 1, k]`."""
    return answered(lab, features, rs.TRAK(), "float32")


def answered(lab: Lab, features: Features, estimator: Estimator, dtype: Any) -> Scores:
    """Of an estimator over features `[n, t, k]` in place of gradients."""
    t = features["train"].shape[1]
    stores = {k: rs.write_store(None, {"f": x}, timesteps=range(t), dtype=dtype) for k, x in features.items()}
    return scored(stores["train"], {kind: stores[kind] for kind in lab.queries}, estimator, dtype)


def simclr(images: Tensor, epochs: int = 60, batch: int = 128, temperature: float = 0.5) -> nn.Module:
    """A small convolutional net whose features `[n, 128]` tell two views of an image from other images.

    Chen, Kornblith, Norouzi, Hinton 2020 (arXiv 2002.05709), at the size of these images: views are shifted by up to an
    eighth, a fifth brighter or darker, and noisy; training images alone, one seed.
    """
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    channels, size = images.shape[1], images.shape[-1]
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(512, 128),
    )  # fmt: skip
    head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=1e-3)

    def view(x: Tensor) -> Tensor:
        reach = max(1, size // 8)
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        moves = torch.randint(2 * reach + 1, (len(x), 2), generator=random).tolist()
        moved = torch.stack([one[:, y : y + size, z : z + size] for one, (y, z) in zip(padded, moves, strict=True)])
        gain = 1 + 0.4 * (torch.rand(len(x), 1, 1, 1, generator=random) - 0.5)
        return (moved + 1) * gain - 1 + 0.1 * torch.randn(x.shape, generator=random)

    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images), generator=random), batch):
            x = images[rows]
            z = F.normalize(head(net(torch.cat([view(x), view(x)]))), dim=1)
            alike = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
            other = torch.arange(2 * len(x)).roll(len(x))
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(alike, other))
            optimizer.step()
    return net.eval()


def untrained(seed: int, lab: Lab) -> Found:
    """Of random weights; 0 is the seed from which the model that is asked about, and those of the truth, began."""
    weights = {name: value.detach().clone() for name, value in lab.untrained(seed).state_dict().items()}
    return of_loss(lab.at(f"untrained {seed}", weights))


def other_seed(lab: Lab) -> Found:
    """Of a model trained on the same images from another seed: what is left belongs to the data, not to the model."""
    if lab.trainer is None:
        raise ValueError("this setting has no trainer.")
    return of_loss(lab.at("seed 1", lab.trainer(np.arange(len(lab.train)), 1)))


def shuffled(axis: int, lab: Lab) -> Found:
    """The loss's scores, their queries (0) or samples (1) in random order."""
    found = of_loss(lab)
    rng = np.random.default_rng(0)
    return replace(found, scores={kind: rng.permutation(x, axis=axis) for kind, x in found.scores.items()})


def of_loss(lab: Lab) -> Found:
    """The recommended way, of the loss alone."""
    return estimated("common 4 x 512", rs.ReTracRidge(), lab)
