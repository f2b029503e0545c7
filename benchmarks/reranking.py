"""Recall of sketches with and without rerank, against exact full-gradient ReTrac: python -m benchmarks.reranking

The demo's digits model, trained into a folder first (minutes) unless it is there; sketches of 512 bytes per sample and
checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDPMScheduler

import retrac_scale as rs
from retrac_scale.demo import QUERY_TIMESTEPS, build_model, generate, load_scans, train
from retrac_scale.query.rerank import exact_scores

DIM = 512
TOP = 10
RERANK = 100


def recall(found: Any, best: Any) -> float:
    """Share of the best ids `[q, k]` that are found, in any order."""
    return float(np.mean([len(np.intersect1d(a, b)) / best.shape[1] for a, b in zip(found, best, strict=True)]))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    scans, scheduler, model = load_scans(), DDPMScheduler(num_train_timesteps=1000), build_model()
    checkpoints = train(model, scheduler, scans, folder)
    generated = generate(model, scheduler, folder / "generated.pt")
    task = rs.DiffusionTask(model, scheduler)
    trained = rs.Samples(scans, task, checkpoints, rs.Recorded(folder / "recorded"))
    queries = rs.Samples(generated, task, checkpoints, rs.EvenlySpaced(QUERY_TIMESTEPS))
    for name, projection in (("CountSketch", rs.CountSketch(DIM)), ("LowRank", rs.LowRank(16, DIM))):
        store = rs.sketch(
            task,
            scans,
            None,
            checkpoints=checkpoints,
            timesteps=trained.timesteps,
            projection=projection,
            progress=False,
        )
        index = rs.build_index(store, rs.ReTrac(), None)
        started = time.perf_counter()
        exact = exact_scores(
            queries, trained, index.ids, index.estimator, index.meta["checkpoints"], index.meta["fingerprint"]
        )
        everything = time.perf_counter() - started
        best = index.ids[np.argsort(-exact, axis=1, kind="stable")[:, :TOP]]
        plain = index.query(queries, TOP)
        started = time.perf_counter()
        answer = index.query(queries, TOP, rerank=RERANK, train=trained)
        took = time.perf_counter() - started
        assert answer.sketch_rank is not None
        assert plain.resolved is not None
        moved = (answer.sketch_rank != np.arange(1, TOP + 1)).mean()
        print(f"{name}({DIM}), int8, {len(scans)} samples, {len(checkpoints)} checkpoints, {len(generated)} queries:")
        print(f"  recall@{TOP} of exact full-gradient ReTrac: {recall(plain.ids, best):.3f} by sketch")
        print(f"  recall@{TOP} with rerank={RERANK}: {recall(answer.ids, best):.3f}; {moved:.0%} of the places changed")
        print(
            f"  largest difference to the exact scores: {np.abs(answer.scores - -np.sort(-exact)[:, :TOP]).max():.1e}"
        )
        print(f"  {plain.resolved.mean():.0%} of neighbours were resolved by the sketch")
        print(f"  reranking took {took:.0f} s, exact scores of all samples {everything:.0f} s", flush=True)


if __name__ == "__main__":
    main()
