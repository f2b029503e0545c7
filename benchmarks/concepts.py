"""Which shape, which colour: pictures asked about for what the model was told of them.

    python -m benchmarks.concepts

A small U-Net is told shape and colour of the 512 pictures of shapes16 as two tokens, one or both of which are left out
now and then; 16 of the 64 combinations are in no training picture. Pictures of combinations that were trained on (new
ones) and of those that were not are asked about for their shape (told both, against the colour alone) and for their
colour. Precision@10 is the share of a list that has the shape, or the colour; beside the plain query, pixels, middle
activations and self-supervised features. Those stand in for CLIP's, which cannot be had without a download, and are
none: the net has seen these training pictures alone, and knows no words. Model and sketches are made first (minutes)
unless they are there; the table goes to benchmarks/results/concepts-shapes16.md.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.yardstick_baselines import simclr
from benchmarks.yardstick_lab import damped, forward_features
from retrac_scale import evaluate
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate.settings import Images, data, shapes
from retrac_scale.evaluate.settings.base import cache
from retrac_scale.evaluate.settings.trainer import one_thread, save
from retrac_scale.evaluate.settings.training import Training, seeded

HERE = Path(__file__).parent
TOKEN, LEFT_OUT, STEPS, BATCH = 32, 0.2, 800, 16
NAME = "encoder_hidden_states"
KINDS = ("shape", "colour")
TOP, ASKED = 10, 32


def tokens(shape: Any, colour: Any) -> Tensor:
    """What the model is told, `[n, 2, TOKEN]`: one orthonormal vector for each shape and colour, and for none (-1)."""
    with seeded(0):
        table = torch.linalg.qr(torch.randn(TOKEN, TOKEN)).Q * TOKEN**0.5
    first, second = (torch.as_tensor(np.asarray(x)) for x in (shape, colour))
    return torch.stack([table[first % 9], table[9 + second % 9]], 1)


def build() -> Any:
    """An untrained U-Net."""
    with seeded(0):
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=TOKEN,
            attention_head_dim=4,
        )


def trained(images: Tensor, numbers: Any, scheduler: Any, file: Path) -> Any:
    """Weights of a model that is told shape and colour, `numbers` `[n, 2]`."""
    if not file.exists():
        model, rng = build(), np.random.default_rng(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / STEPS))
        with one_thread(), seeded(1):
            for _ in tqdm(range(STEPS), desc="train", unit="step"):
                rows = rng.integers(0, len(images), BATCH)
                told = np.where(rng.random((BATCH, 2)) < LEFT_OUT, -1, numbers[rows])
                steps, noise = torch.randint(1000, (BATCH,)), torch.randn(BATCH, *images.shape[1:])
                noisy = scheduler.add_noise(images[rows], noise, steps)
                loss = F.mse_loss(model(noisy, steps, tokens(*told.T)).sample, noise)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                rates.step()
        save(model.state_dict(), file)
    return torch.load(file, weights_only=True)


def asked_pictures(pictures: data.Pictures) -> dict[str, tuple[Images, Any]]:
    """{kind: pictures and their (shape, colour) `[n, 2]`}: of combinations seen in training, and of those held out."""
    held = shapes.held_out_pairs()
    rng = np.random.default_rng(5)
    seen = np.argwhere(~held)[rng.integers(0, int((~held).sum()), ASKED)]
    drawn = data.scaled(shapes.draw(seen[:, 0], seen[:, 1], 5))
    unseen = numbers_of(pictures.held_out_columns)[:ASKED]
    return {
        "trained on": (Images(drawn, "seen", {NAME: tokens(*seen.T)}), seen),
        "held out": (Images(pictures.held_out.images[:ASKED], "unseen", {NAME: tokens(*unseen.T)}), unseen),
    }


def numbers_of(columns: Mapping[str, Any]) -> Any:
    """Shape and colour of pictures by number, `[n, 2]`."""
    order = (list(shapes.SHAPES), list(shapes.COLOURS))
    return np.array([[names.index(x) for x in columns[kind]] for kind, names in zip(KINDS, order, strict=True)]).T


def concepts_of(images: Images, numbers: Any, kind: int) -> list[Any]:
    """Every picture about its own shape (0) or colour (1): told both, against the other alone."""
    without = numbers.copy()
    without[:, kind] = -1
    told, against = tokens(*numbers.T), tokens(*without.T)
    every = zip(images.images, told, against, strict=True)
    return [
        rs.Concepts([{"image": x, NAME: own}], rs.Concept({NAME: own}, {NAME: other}))[0] for x, own, other in every
    ]


def best(scores: Any) -> Any:
    """The first TOP of scores `[q, n]`."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :TOP]


def without_gradients(model: Any, scheduler: Any, train: Images, images: Images, net: Any) -> Iterator[tuple[str, Any]]:
    """Scores `[q, n]` of baselines, which know no concept: one list for shape and colour; `net` gives features."""
    inside = forward_features(model.eval(), scheduler, {"train": train, "asked": images})["middle activations"]
    with torch.no_grad():
        flat, seen = ([of(x.images).double().numpy() for x in (train, images)] for of in (nn.Flatten(), net))
    seen = [x - seen[0].mean(0) for x in seen]
    for name, sides in (
        ("pixel ridge", [[x] for x in flat]),
        ("self-supervised features, ridge", [[x] for x in seen]),
        ("middle activations, same ridge", [list(inside[x].transpose(1, 0, 2)) for x in ("train", "asked")]),
    ):
        unit = [[x / np.linalg.norm(x, axis=1, keepdims=True) for x in side] for side in sides]
        yield name, sum(damped(a.astype(float), b.astype(float), [AUTO])[0] for a, b in zip(*unit, strict=True))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in seen)
    yield "self-supervised features, centred cosine", second @ first.T


class Listed(list[Any]):
    """Items with ids."""

    ids: list[str]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=cache(), help="where the model is kept")
    work = parser.parse_args().work / "concepts16"
    pictures, scheduler = data.shapes16(None), Training().scheduler()
    numbers = numbers_of(pictures.columns)
    weights = trained(pictures.train.images, numbers, scheduler, work / "model.pt")
    task, checkpoints = rs.DiffusionTask(build(), scheduler), {"last": weights}
    train = replace(pictures.train, given={NAME: tokens(*numbers.T)})
    kept: dict[str, Any] = {"checkpoints": checkpoints, "dtype": "float32"}
    stores = {
        "all parameters": rs.sketch(task, train, work / "all.zarr", **kept),
        "cross-attention": rs.sketch(task, train, work / "attention.zarr", parameters=["*attn2*"], **kept),
    }
    indexes = {
        f"{type(estimator).__name__}, {name}": rs.build_index(stores[name], estimator, None)
        for name, estimator in (
            ("all parameters", rs.ReTracRidge()),
            ("cross-attention", rs.ReTracRidge()),
            ("cross-attention", rs.ReTrac(pairing="matched")),
        )
    }
    model, net = build(), simclr(train.images)
    model.load_state_dict(weights)
    lines = []
    for where, (images, own) in asked_pictures(pictures).items():
        about = [Listed(concepts_of(images, own, kind)) for kind in range(2)]
        for one in about:
            one.ids = images.ids
        found: dict[str, list[Any]] = {}
        for name, store in stores.items():
            options = {"checkpoints": checkpoints, "like": store, "dtype": "float32", "progress": False}
            plain, *asked = (rs.sketch(task, one, None, **options) for one in (images, *about))  # type: ignore[arg-type]
            for label, index in indexes.items():
                if not label.endswith(name):
                    continue
                scores = [np.asarray(index.scores(one)) for one in asked]
                found[f"concept; {label}"] = [best(one) for one in scores]
                found[f"concept, either sign; {label}"] = [best(abs(one)) for one in scores]
                found[f"plain query; {label}"] = [best(np.asarray(index.scores(plain)))] * 2
        found |= {name: [best(scores)] * 2 for name, scores in without_gradients(model, scheduler, train, images, net)}
        for name, ids in found.items():
            shares = [(numbers[one, kind] == own[:, [kind]]).mean(1) for kind, one in enumerate(ids)]
            cells = " | ".join(f"{evaluate.bootstrap(np.mean, share):.3g}" for share in shares)
            lines.append(f"| {where} | {name} | {cells} |")
            print(lines[-1], flush=True)
    _, t, k = stores["all parameters"].shape
    about_it = [
        f"`python -m benchmarks.concepts`, {datetime.date.today()}, {cpu_name()}; torch {torch.__version__}.",
        "Written by that command.\n",
        f"{len(train)} training images at {t} timesteps of {k} entries; {ASKED} pictures of either kind.",
        f"Precision@{TOP}; brackets: 95 % intervals over pictures. Self-supervised features: of a small net that was",
        "trained on the same 512 pictures without labels; it is no CLIP, which would know other pictures and words.\n",
        "| combinations | method | shape | colour |",
        "| --- | --- | --- | --- |",
    ]
    text = "\n".join(["# Concepts: shapes x colours\n", *about_it, *lines, ""])
    (HERE / "results" / "concepts-shapes16.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
