"""How well sketches rank: ReTrac's scores from sketches against those from full gradients, and what a sketch costs.

Two trained models: U-small on scikit-learn's digits, and a small DiT on patches of scikit-learn's two photographs.
1,000 training images, 128 generated ones as queries, averaged over 4 timesteps. Every projection, dim and row dtype
gets recall@10, the rank correlation of the scores (Spearman, per query, averaged) and the error of the sketch's own
norm, averaged over seeds; its time comes from `sketching.Bench` on the same model. Writes JSON and the frontier plots.

    python benchmarks/fidelity.py                        # trains once (minutes), keeps the weights in benchmarks/.cache
    python benchmarks/fidelity.py --seeds 20 --skip-time # tighter figures, times as they were
    python benchmarks/fidelity.py --retime               # times anew, recalls as they were
    python benchmarks/fidelity.py --retime --skip-time   # tables and plots once more
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from models import build
from scipy.stats import spearmanr
from sketching import Bench, Step, measure
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import retrac_scale as rs
from retrac_scale.projections import Projection, Projector
from retrac_scale.store.encoding import decode, encode

HERE = Path(__file__).parent
TRAIN, QUERIES, SAMPLING_STEPS = 1000, 128, 50
TIMESTEPS = (125, 375, 625, 875)  # the middles of four ranges: EvenlySpaced(4) would spend two of them on 1 and 999
EPOCHS, BATCH, LEARNING_RATE = 40, 32, 2e-3
SAMPLES = 16  # per batch of gradients: 64 pairs
DIMS = (512, 1024, 2048, 4096, 8192)
RANKS = (4, 8, 16)  # LowRank() has 4 up to dim 2048, 8 at 4096, 16 at 8192
CLOSE_ROUNDS = 16  # times as many of them for what differs from the default in a larger dim, hardly in time
CLOSE_SEEDS = 4  # times as many of them for what differs from the default in rank, hardly in recall
DENSE_DIMS = (512, 1024, 2048)
PEER_DIMS = (2048,)
DTYPES = {"int8": 1, "float16": 2, "float32": 4}
DEFAULT = f"LowRank({RANKS[0]}, {rs.LowRank().dim})"  # what LowRank() is


class UnlabelledDiT(nn.Module):
    """A DiT of 0.9 M parameters for 16 x 16 colour images, called like a U-Net: every image has label 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dit = DiTTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=4,
            sample_size=16,
            patch_size=2,
            num_embeds_ada_norm=1,
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, return_dict: bool = True) -> Any:
        """As `UNet2DModel`."""
        return self.dit(noisy, timesteps, class_labels=torch.zeros_like(timesteps), return_dict=return_dict)


def digits() -> Tensor:
    """`[n, 1, 16, 16]` in -1 .. 1, in random order."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TRAIN]
    return F.interpolate(images[order], size=16, mode="bilinear", align_corners=False)


def patches() -> Tensor:
    """`[n, 3, 16, 16]` in -1 .. 1, from random places of the two photographs at half resolution."""
    rng = np.random.default_rng(0)
    photos = [torch.from_numpy(photo).permute(2, 0, 1).float() / 127.5 - 1 for photo in load_sample_images().images]
    photos = [F.avg_pool2d(photo[None], 2)[0] for photo in photos]
    cut = []
    for number in range(TRAIN):
        photo = photos[number % 2]
        top, left = (int(rng.integers(0, size - 16)) for size in photo.shape[1:])
        cut.append(photo[:, top : top + 16, left : left + 16])
    return torch.stack(cut)


CASES = {"digits, U-Net": (digits, lambda: build("u-small")), "photo patches, DiT": (patches, UnlabelledDiT)}


def trained(name: str, images: Tensor, model: nn.Module, scheduler: Any) -> nn.Module:
    """The model after `EPOCHS` epochs; weights are kept."""
    file = HERE / ".cache" / f"{name}.pt"
    if not file.exists():
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
        steps = EPOCHS * (TRAIN // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps)
        )
        generator = torch.Generator().manual_seed(0)
        model.train()
        for _ in tqdm(range(steps), desc=f"train {name}", unit="step"):
            clean = images[torch.randint(0, TRAIN, (BATCH,), generator=generator)]
            noise = torch.randn(clean.shape, generator=generator)
            times = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
            noisy = scheduler.add_noise(clean, noise, times)
            loss = F.mse_loss(model(noisy, times, return_dict=False)[0], noise)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        print(f"{name}: last training loss {loss.item():.3f}")
        file.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def generated(name: str, shape: torch.Size, model: nn.Module, scheduler: Any) -> Tensor:
    """`QUERIES` images from the model; kept."""
    file = HERE / ".cache" / f"{name}, generated.pt"
    if not file.exists():
        sampler = DDIMScheduler.from_config(scheduler.config)
        sampler.set_timesteps(SAMPLING_STEPS)
        images = torch.randn(QUERIES, *shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for step in tqdm(sampler.timesteps, desc=f"generate {name}", unit="step"):
                noise = model(images, step.repeat(QUERIES), return_dict=False)[0]
                images = sampler.step(noise, step, images).prev_sample
        torch.save(images.clamp(-1, 1), file)
    images = torch.load(file, weights_only=True)
    return images


@dataclass(frozen=True)
class Several(Projection):
    """Projections of the same gradients, side by side in one sketch."""

    parts: tuple[Projection, ...]

    def bind(self, shapes: Any, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        return _Several([part.bind(shapes, mixable, device) for part in self.parts])


class _Several(Projector):
    def __init__(self, parts: list[Projector]) -> None:
        self.parts = parts
        self.mixers, self.exact_norm = parts[0].mixers, parts[0].exact_norm
        self.widths = [part.start(1).shape[1] for part in parts]
        self.dims = [part.dim for part in parts]
        self.dim = sum(self.dims)

    def start(self, n: int) -> Tensor:
        return torch.zeros(n, sum(self.widths))

    def add(self, accumulator: Tensor, name: str, gradient: Tensor) -> Tensor | None:
        own = torch.split(accumulator, self.widths, 1)
        squares = [part.add(each, name, gradient) for part, each in zip(self.parts, own, strict=True)]
        return squares[0]

    def add_mixed(self, accumulator: Tensor, name: str, gradient: Tensor) -> Tensor | None:
        own = torch.split(accumulator, self.widths, 1)
        squares = [part.add_mixed(each, name, gradient) for part, each in zip(self.parts, own, strict=True)]
        return squares[0]

    def finish(self, accumulator: Tensor) -> Tensor:
        own = torch.split(accumulator, self.widths, 1)
        return torch.cat([part.finish(each) for part, each in zip(self.parts, own, strict=True)], 1)


class Gradients:
    """The sketches of all pairs of a data set at a trained model."""

    def __init__(self, model: nn.Module, scheduler: Any, images: Tensor) -> None:
        self.model, self.images = model, images
        self.task = rs.DiffusionTask(model, scheduler)
        self.ids = np.arange(len(images))
        self.plan = rs.Explicit(TIMESTEPS).pairs("trained", self.ids, self.task.num_train_timesteps)

    def sketched(self, projection: Projection, desc: str) -> Iterator[tuple[slice, Any, Any]]:
        """Samples, their sketches `[n, t, k]` and norms `[n, t]`, batch by batch."""
        with rs.GradientSketcher(self.model, projection) as sketcher:
            for start in tqdm(range(0, len(self.images), SAMPLES), desc=desc, unit="batch"):
                samples = slice(start, min(start + SAMPLES, len(self.images)))
                sketch, norm = sketcher(self._losses(samples))
                n = samples.stop - samples.start
                yield samples, sketch.reshape(n, len(TIMESTEPS), -1), norm.reshape(n, len(TIMESTEPS))

    def _losses(self, samples: slice) -> Tensor:
        times = self.plan.timesteps[samples].reshape(-1)
        noise = rs.draw_noise(
            self.images.shape[1:], self.ids[samples].repeat(len(TIMESTEPS)), times, self.plan.seeds[samples].reshape(-1)
        )
        clean = self.images[samples].repeat_interleave(len(TIMESTEPS), 0)
        return self.task.losses(clean, torch.from_numpy(times), noise, {})


def fidelity(rows: Any, exact: Any) -> dict[str, float]:
    """Of ReTrac rows `[n, k]`, training images first, against exact scores `[q, train]`."""
    scores = rows[TRAIN:] @ rows[:TRAIN].T
    best, true = np.argsort(-scores, 1)[:, :10], np.argsort(-exact, 1)[:, :10]
    recall = [np.isin(a, b).mean() for a, b in zip(best, true, strict=True)]
    rank = [spearmanr(a, b).statistic for a, b in zip(scores, exact, strict=True)]
    return {"recall_at_10": float(np.mean(recall)), "rank_correlation": float(np.mean(rank))}


def stored(rows: Any, dtype: Any) -> Any:
    """Rows as they come back from a store or an index of this dtype."""
    return decode(*encode(rows, dtype))


def judge(projection: str, k: int, sketches: Any, norms: Any, true_norms: Any, exact: Any) -> list[dict[str, Any]]:
    """One line per dtype for sketches `[n, t, k]` that come with `norms`."""
    error = float(np.abs(np.linalg.norm(sketches, axis=2) / true_norms - 1).mean())
    lines = []
    for dtype, size in DTYPES.items():
        rows = stored((stored(sketches, dtype) / norms[..., None]).mean(1), dtype)
        lines.append(
            {"projection": projection, "k": k, "dtype": dtype, "bytes": k * size, "norm_error": error}
            | fidelity(rows, exact)
        )
    return lines


def compare(gradients: Gradients, seeds: int, peers: bool) -> list[dict[str, Any]]:
    """Every projection, dim and dtype on one data set."""
    n = len(gradients.images)
    lines = []
    norms = np.empty((n, len(TIMESTEPS)), np.float32)
    directions: Any = None
    folds = [rs.CountSketch(dim, seed) for seed in range(seeds) for dim in DIMS]
    counted = {fold: np.empty((n, len(TIMESTEPS), fold.dim), np.float32) for fold in folds}
    for samples, sketch, norm in gradients.sketched(Several((rs.Identity(), *folds)), "full gradients"):
        size = sketch.shape[2] - sum(fold.dim for fold in folds)
        full, *parts = torch.split(sketch, [size, *(fold.dim for fold in folds)], 2)
        directions = torch.empty(n, size) if directions is None else directions
        directions[samples] = (full / norm[..., None]).mean(1)
        norms[samples] = norm
        for fold, part in zip(folds, parts, strict=True):
            counted[fold][samples] = part
    exact = (directions[TRAIN:] @ directions[:TRAIN].T).numpy()
    for fold, sketches in counted.items():
        lines += judge(f"CountSketch({fold.dim})", fold.dim, sketches, norms, norms, exact)
    del counted
    for rank in RANKS:
        for seed in range(CLOSE_SEEDS * seeds):
            dims = DIMS if seed < seeds else (rs.LowRank().dim,)
            lines += lowrank(gradients, rank, dims, seed, norms, exact)
    projectors = {"Dense": (DENSE_DIMS, dense)}
    if peers:
        projectors |= {"TRAK's BasicProjector": (PEER_DIMS, trak), "dattri's BasicProjector": (PEER_DIMS, dattri)}
    lengths = np.linalg.norm(directions, axis=1)
    for name, (dims, project) in projectors.items():
        for dim, sketches in project(directions, dims).items():
            error = float(np.abs(np.linalg.norm(sketches, axis=1) / lengths - 1).mean())
            for dtype, width in DTYPES.items():
                lines.append(
                    {
                        "projection": f"{name}({dim})",
                        "k": dim,
                        "dtype": dtype,
                        "bytes": dim * width,
                        "norm_error": error,
                    }
                    | fidelity(stored(sketches, dtype), exact)
                )
    return averaged(lines)


def lowrank(
    gradients: Gradients, rank: int, dims: tuple[int, ...], seed: int, norms: Any, exact: Any
) -> list[dict[str, Any]]:
    """Lines of LowRank(rank, dim, seed), whose dims all mix alike and share a pass."""
    low = [np.empty((*norms.shape, dim), np.float32) for dim in dims]
    mixed = Several(tuple(rs.LowRank(rank, dim, seed) for dim in dims))
    for samples, sketch, _ in gradients.sketched(mixed, f"LowRank, rank {rank}, seed {seed}"):
        for own, part in zip(low, torch.split(sketch, dims, 2), strict=True):
            own[samples] = part
    lines = []
    for dim, sketches in zip(dims, low, strict=True):
        lines += judge(f"LowRank({rank}, {dim})", dim, sketches, np.linalg.norm(sketches, axis=2), norms, exact)
    return lines


# The dense projections multiply the directions averaged over timesteps, which is the same by linearity and 4 times
# less; the first columns of a wide matrix serve as the narrower ones.


def dense(directions: Tensor, dims: tuple[int, ...]) -> dict[int, Any]:
    """Sketches `{dim: [n, dim]}` with our Dense."""
    widest = max(dims)
    projector = rs.Dense(widest).bind({"all": (directions.shape[1],)}, {}, torch.device("cpu"))
    sketches = projector.finish(directions).numpy()
    return {dim: sketches[:, :dim] * (widest / dim) ** 0.5 for dim in dims}


def trak(directions: Tensor, dims: tuple[int, ...]) -> dict[int, Any]:
    """With TRAK's, which leaves out 1/sqrt(k)."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(directions.shape[1], max(dims), 0, ProjectionType.normal, torch.device("cpu"))
    sketches = projector.project(directions, model_id=0).numpy()
    return {dim: sketches[:, :dim] / dim**0.5 for dim in dims}


def dattri(directions: Tensor, dims: tuple[int, ...]) -> dict[int, Any]:
    """With dattri's."""
    from dattri.func.projection import random_project

    widest = max(dims)
    sketches = random_project(directions, len(directions), widest, 32, proj_type="normal")(directions, ensemble_id=0)
    return {dim: sketches.numpy()[:, :dim] * (widest / dim) ** 0.5 for dim in dims}


def averaged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of several seeds of a projection become their mean, with the standard error of its recall."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["projection"], line["dtype"]), []).append(line)
    measured = ("norm_error", "recall_at_10", "rank_correlation")
    return [
        group[0]
        | {name: statistics.mean(line[name] for line in group) for name in measured}
        | {"recall_error": _error([line["recall_at_10"] for line in group])}
        for group in groups.values()
    ]


def _error(values: list[float]) -> float:
    """Of the mean; none is known for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def times(model: nn.Module, images: Tensor, scheduler: Any, rounds: int, peers: bool) -> dict[str, dict[str, float]]:
    """Time per pair of each projection over that of the training step; and the error of its distance to the default's.

    Both are of medians of ratios to the default in the same round. The dense ones take seconds a step and are timed
    once.
    """
    generator = torch.Generator().manual_seed(1)
    clean = images[:SAMPLES].repeat_interleave(len(TIMESTEPS), 0)
    noise = torch.randn(clean.shape, generator=generator)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=generator)

    def bench(dim: int) -> Bench:
        made = Bench("u-small", len(clean), dim, "cpu")
        made.model, made.noisy, made.timesteps, made.noise = (
            model,
            scheduler.add_noise(clean, noise, steps),
            steps,
            noise,
        )
        return made

    ours = bench(max(DIMS)).ours
    contenders = {"floor": bench(max(DIMS)).floor()}
    contenders |= {f"CountSketch({dim})": ours(rs.CountSketch(dim)) for dim in DIMS}
    contenders |= {f"LowRank({rank}, {dim})": ours(rs.LowRank(rank, dim)) for rank in RANKS for dim in DIMS}
    seconds = measure(contenders, rounds, 1, "cpu")
    for dim in (min(DENSE_DIMS), max(DENSE_DIMS)):
        seconds[f"Dense({dim})"] = [once(ours(rs.Dense(dim)))]
    for dim in PEER_DIMS if peers else ():
        seconds[f"TRAK's BasicProjector({dim})"] = [once(bench(dim).traker())]
        seconds[f"dattri's BasicProjector({dim})"] = [once(bench(dim).dattri())]
    close = [f"LowRank({RANKS[0]}, {dim})" for dim in DIMS if dim >= rs.LowRank().dim]
    again = measure({name: contenders[name] for name in close}, CLOSE_ROUNDS * rounds, 1, "cpu")
    ratios = _over_default(seconds) | _over_default(again)
    step = statistics.median(ratios["floor"])
    return {
        name: {"time": statistics.median(own) / step, "time_error": _error_of_median(own) / step}
        for name, own in ratios.items()
    }


def _over_default(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """In the same round; a single time is over the default's median."""
    default = seconds[DEFAULT]
    middle = [statistics.median(default)]
    return {
        name: [a / b for a, b in zip(own, default if len(own) > 1 else middle, strict=True)]
        for name, own in seconds.items()
    }


def _error_of_median(values: list[float]) -> float:
    """From the distance of the quartiles, which outliers leave as it is."""
    if len(values) == 1:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4)
    return 0.93 * (third - first) / len(values) ** 0.5


def once(step: Step) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, recall) that no other beats in both, cheapest first."""
    kept: list[str] = []
    for name, (_, recall) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not kept or recall > points[kept[-1]][1]:
            kept.append(name)
    return kept


def family(projection: str) -> str:
    """Its name in the plots' legend."""
    name, _, arguments = projection.partition("(")
    return f"LowRank, rank {arguments.split(',')[0]}" if "," in arguments else name


def plot(results: dict[str, Any], cost: str, label: str, file: Path) -> None:
    """recall@10 of int8 rows against a cost, with errors, one panel per data set; default ringed, frontier dashed."""
    figure, (panels,) = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        lines = [line for line in result["lines"] if line["dtype"] == "int8" and line.get(cost) is not None]
        families: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            families.setdefault(family(line["projection"]), []).append(line)
        for own, members in families.items():
            members.sort(key=lambda line: line["k"])
            columns = ([member[key] for member in members] for key in (cost, "recall_at_10", "recall_error"))
            axes.errorbar(*columns, fmt="o-", ms=4, lw=1, label=own)
        points = {line["projection"]: (line[cost], line["recall_at_10"]) for line in lines}
        edge = [points[point] for point in frontier(points)]
        axes.plot(*zip(*edge, strict=True), "k--", lw=0.8, label="frontier")
        axes.plot(*points[DEFAULT], "o", ms=12, mfc="none", mec="k")
        axes.annotate(DEFAULT, points[DEFAULT], xytext=(6, -14), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel=label, title=name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("recall@10 of ReTrac")
    panels[0].legend(fontsize=8, loc="lower right")  # which has the peers too
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(name: str, result: dict[str, Any]) -> None:
    """A table, the targets and the frontiers of one data set."""
    print(f"\n{name}: {result['parameters'] / 1e6:.2f} M parameters, {TRAIN} images, {QUERIES} queries")
    print(f"{'projection':28} {'dtype':8} {'bytes':>6} {'recall@10':>9} {'rank corr':>9} {'norm err':>9} {'time':>6}")
    for line in result["lines"]:
        cost = "" if line.get("time") is None else f"{line['time']:6.2f}"
        print(
            f"{line['projection']:28} {line['dtype']:8} {line['bytes']:6} {line['recall_at_10']:9.3f} "
            f"{line['rank_correlation']:9.3f} {line['norm_error']:9.1%} {cost:>6}"
        )
    found = {(line["projection"], line["dtype"]): line for line in result["lines"]}
    for projection, target in ((DEFAULT, 0.90), ("CountSketch(1024)", 0.90), ("CountSketch(8192)", 0.95)):
        line = found[projection, "int8"]
        verdict = "met" if line["recall_at_10"] >= target else "missed"
        print(f"{projection}, int8, {line['bytes']} bytes: recall@10 {line['recall_at_10']:.3f} >= {target}: {verdict}")
    for cost in ("bytes", "time"):
        points = {
            line["projection"]: (line[cost], line["recall_at_10"])
            for line in result["lines"]
            if line["dtype"] == "int8" and line.get(cost) is not None
        }
        if points:
            print(f"frontier of recall@10 against {cost}: {' < '.join(frontier(points))}")
    rows = [line for line in result["lines"] if line["dtype"] == "int8" and line.get("time") is not None]
    own = found[DEFAULT, "int8"]
    for costs in (("bytes",), ("time",), ("bytes", "time")) if rows else ():
        better = [line for line in rows if line["recall_at_10"] > own["recall_at_10"]]
        better = [line for line in better if all(_more(line, own, cost) < 2 for cost in costs)]
        told = "; ".join(_difference(line, own) for line in better) or "nothing"
        print(
            f"{DEFAULT}: what may recall more in no more {' and '.join(costs)}: {told}: {_verdict(better, own, costs)}"
        )


def _verdict(better: list[dict[str, Any]], own: dict[str, Any], costs: tuple[str, ...]) -> str:
    """Where a line is that these may be above; they are where all differences are of two errors or more."""
    if any(
        _more(line, own, "recall_at_10") > 2 and all(_more(line, own, cost) < -2 for cost in costs) for line in better
    ):
        return "off the frontier"
    return "not told apart from it" if better else "on the frontier"


def _more(line: dict[str, Any], own: dict[str, Any], what: str) -> float:
    """What a line has more than another, in errors of the difference; bytes have none, and as many are not more."""
    if what == "bytes":
        return math.inf if line[what] > own[what] else -math.inf
    error = what.removesuffix("_at_10") + "_error"
    difference: float = line[what] - own[what]
    return difference / max(math.hypot(line[error], own[error]), 1e-9)


def _difference(line: dict[str, Any], own: dict[str, Any]) -> str:
    """What a line has on another, with standard errors."""
    differences = []
    for what in ("recall_at_10", "time"):
        error = what.removesuffix("_at_10") + "_error"
        differences.append(f"{what} {line[what] - own[what]:+.4f} +- {math.hypot(line[error], own[error]):.4f}")
    return f"{line['projection']} ({', '.join(differences)})"


def written(file: Path) -> dict[str, Any]:
    """Results that a run before has left."""
    found: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    return found


def timed(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What `times` has told of a run before."""
    return {line["projection"]: {key: line[key] for key in ("time", "time_error")} for line in lines if "time" in line}


def main() -> None:
    """Train if needed, compare, time, print, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seeds = f"of CountSketch and LowRank, averaged; {CLOSE_SEEDS} times as many of LowRank at its default dim"
    parser.add_argument("--seeds", type=int, default=10, help=seeds)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-time", action="store_true", help="keep the times in --out")
    parser.add_argument("--retime", action="store_true", help="keep the recalls in --out, measure times anew")
    parser.add_argument("--skip-peers", action="store_true", help="TRAK and dattri, which run on the first data set")
    parser.add_argument("--only", choices=CASES, help="one data set; what --out has of the other is kept")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity.json")
    parser.add_argument("--plots", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scheduler = DDPMScheduler()
    results: dict[str, Any] = {}
    for name, (load, make) in CASES.items():
        if arguments.only not in (None, name):
            continue
        images = load()
        model = trained(name, images, make(), scheduler)
        if arguments.train_only:
            continue
        everything = torch.cat([images, generated(name, images.shape[1:], model, scheduler)])
        peers = name == next(iter(CASES)) and not arguments.skip_peers
        if arguments.retime:
            results[name] = written(arguments.out)[name]
        else:
            lines = compare(Gradients(model, scheduler, everything), arguments.seeds, peers)
            size = sum(value.numel() for value in model.parameters())
            results[name] = {"parameters": size, "seeds": arguments.seeds, "lines": lines}
        if arguments.skip_time:
            costs = timed(written(arguments.out).get(name, {"lines": []})["lines"])
        else:
            costs = times(model, images, scheduler, arguments.rounds, peers)
        for line in results[name]["lines"]:
            line |= costs.get(line["projection"], {})
        report(name, results[name])
    if arguments.train_only:
        return
    results = written(arguments.out) | results
    settings = {"command": " ".join(["python", *sys.argv]), "date": datetime.date.today().isoformat()}
    settings |= {"machine": platform.machine(), "threads": arguments.threads, "torch": torch.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n")
    plot(results, "bytes", "bytes per pair (int8 rows)", arguments.plots / "fidelity-bytes.png")
    if all(timed(result["lines"]) for result in results.values()):
        plot(results, "time", "time per pair, training step = 1", arguments.plots / "fidelity-time.png")


if __name__ == "__main__":
    main()
