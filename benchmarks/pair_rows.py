"""Rows of real gradients, and queries like them: the pairs of a sketch store, whoever made it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import retrac_scale as rs
from retrac_scale.store.encoding import encode

ASKED = 64


def options_of(text: str | None) -> argparse.Namespace:
    """What the command line of a benchmark of such rows says: `store`, and how many `rows` times are of."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a sketch store in int8")
    parser.add_argument("--rows", type=int, default=1_000_000, help="to be timed, those of the store over and over")
    return parser.parse_args()


def pair_rows(store: rs.SketchStore) -> tuple[Any, Any]:
    """All pairs of sample, timestep and checkpoint that a store has, but those of ASKED samples, which are asked about.

    Returns:
        int8 rows `[n, k]`, to be scaled to length 1; and one pair of each sample that is left out, float32 `[ASKED, k]`
        of length 1.
    """
    parts = [
        store.sketches(name, block)
        for name in store.checkpoints
        for block, done in zip(store.blocks, store.committed(name), strict=True)
        if done
    ]
    pairs = np.concatenate(parts)
    rng = np.random.default_rng(0)
    asked = rng.choice(len(pairs), ASKED, replace=False)
    queries = pairs[asked, rng.integers(0, pairs.shape[1], ASKED)]
    rows = np.delete(pairs, asked, axis=0).reshape(-1, pairs.shape[-1])
    return encode(rows, "int8")[0], queries / np.linalg.norm(queries, axis=1, keepdims=True)
