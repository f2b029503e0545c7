"""Which curvature on the query side comes nearest to the influence function of the full empirical Fisher matrix.

A small U-Net is trained on scikit-learn's digits. The reference is g_q^T (F + lambda I)^-1 g_i over all parameters, F
the mean of g g^T over all pairs of the training samples, solved exactly in the space that the pairs span. Every route
has the same lambda = damping x trace(F) / parameters; what is compared is the rank correlation, query by query.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import retrac_scale as rs

SAMPLES, QUERIES, EPOCHS, BATCH = 256, 32, 60, 32


def main() -> None:
    """Print one line per route and damping."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=4096, help="k of the CountSketch (default: 4096)")
    parser.add_argument("--timesteps", type=int, default=4, help="per sample (default: 4)")
    arguments = parser.parse_args()
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    train, asked = images[:SAMPLES], images[SAMPLES : SAMPLES + QUERIES]
    task, state = trained(train)
    print(f"python {' '.join(sys.argv)}\n{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    plan = rs.EvenlySpaced(arguments.timesteps)
    options = {"checkpoints": {"last": state}, "timesteps": plan, "progress": False, "dtype": "float32"}
    full, full_queries = (rs.sketch(task, x, None, projection=rs.Identity(), **options) for x in (train, asked))
    store = rs.sketch(task, train, None, projection=rs.CountSketch(arguments.dim), **options)
    samples = rs.Samples(train, task, {"last": state}, plan)
    g = full.sketches("last").reshape(SAMPLES * arguments.timesteps, -1).astype(np.float64)
    rows, queries = (x.sketches("last").mean(1).astype(np.float64) for x in (full, full_queries))
    size = g.shape[1]
    print(f"{size} parameters, {len(g)} pairs, {QUERIES} queries, CountSketch({arguments.dim})")
    print(f"{'damping':>8}  {'route':32} {'rank correlation':>16}  seconds to prepare")
    gram = g @ g.T / len(g)
    for damping in (0.1, 1.0, 10.0):
        penalty = damping * np.trace(gram) / size
        solved = queries - (queries @ g.T / len(g)) @ np.linalg.solve(gram + penalty * np.eye(len(g)), g)
        reference = solved @ rows.T
        routes = {"none (GradDot)": None, "diagonal": rs.fisher_divisors, "Kronecker": rs.kronecker_divisors}
        for name, route in routes.items():
            start = time.perf_counter()
            divisors = None if route is None else route(samples, damping=damping)
            seconds = time.perf_counter() - start
            for where, like in (("full gradients", full), ("sketched", store)):
                made = rs.sketch(task, asked, None, precondition=divisors, like=like, **options)
                scores = rs.build_index(like, rs.GradDot(), None, dtype="float32").scores(made).compute()
                report(damping, f"{name}, {where}", scores, reference, seconds)
        sketched = rs.sketch(task, asked, None, like=store, **options)
        trak = rs.TRAK(penalty * SAMPLES * arguments.dim / trace(store))
        scores = rs.build_index(store, trak, None, dtype="float32").scores(sketched).compute()
        report(damping, "TRAK, sketched", scores, reference, 0.0)


def trace(store: rs.SketchStore) -> float:
    """Of the Gram matrix that TRAK solves."""
    return float(np.square(store.sketches("last").mean(1).astype(np.float64)).sum())


def report(damping: float, name: str, scores: np.ndarray, reference: np.ndarray, seconds: float) -> None:
    """One line."""
    ranks = [spearmanr(a, b).statistic for a, b in zip(scores, reference, strict=True)]
    print(f"{damping:>8}  {name:32} {np.mean(ranks):16.3f}  {seconds:.1f}", flush=True)


def trained(images: torch.Tensor) -> tuple[rs.DiffusionTask, dict[str, torch.Tensor]]:
    """A task with a small U-Net, and its weights."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            times = torch.randint(0, 1000, (len(batch),), generator=generator)
            noise = torch.randn(images[batch].shape, generator=generator)
            noisy = scheduler.add_noise(images[batch], noise, times)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(noisy, times).sample, noise).backward()
            optimizer.step()
    return rs.DiffusionTask(model, scheduler), {name: value.clone() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    main()
