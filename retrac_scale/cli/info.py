"""The verb info."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.project import find
from retrac_scale.cli.repeated import told
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.store import SketchStore

SAMPLED_BLOCKS = 32
"""About how many blocks of each checkpoint are read for their norms."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="path or fsspec URL")
    parser.add_argument(
        "--repeatability", action="store_true", help="tell how far another run would agree, however large this one is"
    )


def _run(arguments: argparse.Namespace) -> Answer:
    import zarr

    from retrac_scale.query.index import open_index
    from retrac_scale.store import open_store
    from retrac_scale.store.schema import ATTRIBUTE

    url = arguments.url or find(arguments.config).store
    try:
        meta = zarr.open_group(url, mode="r").attrs.get(ATTRIBUTE)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no store or index at {url}.") from None
    if isinstance(meta, dict) and meta.get("what") == "index":
        index = open_index(url)
        c, n, k = index.shape
        lines = [
            f"index of {index.estimator}",
            f"{c} checkpoints x {n} samples x {k} entries, {index.meta['dtype']}",
            f"made from {index.meta['store']}",
        ]
        shape = {"checkpoints": c, "samples": n, "entries": k}
        kept = {name: index.meta[name] for name in ("estimator", "dtype", "store")}
        if index.estimator.pairing == "matched":
            line, kept["repeatability"] = told(index, c * n * k, arguments.repeatability, url)
            lines.append(line)
        return Answer("\n".join(lines), {"what": "index", **shape, **kept})
    stores = [open_store(url, measure=measure) for measure in open_store(url).measurements]
    every = [_describe(store, url, arguments.repeatability) for store in stores]
    return Answer("\n".join(text for text, _ in every), {"what": "store", "measurements": [data for _, data in every]})


def _describe(store: SketchStore, url: str, repeatability: bool) -> tuple[str, dict[str, Any]]:
    import numpy as np

    n, t, k = store.shape
    about = {key: store.fingerprint.get(key, "not stated") for key in ("projection", "measure", "timesteps")}
    lines = [
        f"sketch store, {n} samples x {t} timesteps x {k} entries, {store.meta['dtype']}",
        *(f"{key}: {value}" for key, value in about.items()),
        f"columns: {', '.join(store.columns) or 'none'}; deleted samples: {store.deleted.sum()}",
        f"blocks of {store.meta['block_samples']} samples, {len(store.parts)} part(s), revision {store.revision}",
    ]
    widths = np.array([block.stop - block.start for block in store.blocks])
    pairs = written = 0
    norms, steps, checkpoints = [], [], {}
    for name, weight in store.weights.items():
        done = store.committed(name)
        lines.append(f"checkpoint {name}: weight {weight:.4g}, {done.sum()} of {len(done)} blocks committed")
        checkpoints[name] = {"weight": weight, "blocks": len(done), "committed": int(done.sum())}
        written += t * int(widths[done].sum())
        pairs += n * t
        some = np.flatnonzero(done)[:: max(1, len(done) // SAMPLED_BLOCKS)].tolist() if store.has("timestep") else []
        norms += [store.norms(name, store.blocks[block]).ravel() for block in some]
        steps += [store.timesteps(name, store.blocks[block]).ravel() for block in some]
    item = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}[store.meta["dtype"]]
    size = f"{written * k * item / 1e6:.1f} MB of sketches, {4 / item:.0f} times smaller than in float32"
    lines.append(f"{written} of {pairs} pairs, {size}")
    curve = []
    every, norm = (np.concatenate([np.empty(0), *planes]) for planes in (steps, norms))
    every, norm = every[every >= 0], norm[every >= 0]  # a visit that was not made stands at -1
    if len(every):
        edges = np.unique(np.linspace(every.min(), every.max() + 1, 6).astype(int))
        for low, high in itertools.pairwise(edges.tolist()):
            inside = (every >= low) & (every < high)
            if inside.any():
                curve.append({"from": low, "to": high - 1, "mean_norm": float(norm[inside].mean())})
                lines.append(f"mean gradient norm, timesteps {low} .. {high - 1}: {norm[inside].mean():.4g}")
    data = {"samples": n, "timesteps": t, "entries": k, "dtype": store.meta["dtype"], "about": about}
    data |= {"columns": list(store.columns), "deleted": int(store.deleted.sum()), "revision": store.revision}
    data |= {"checkpoints": checkpoints, "pairs": pairs, "pairs_written": written, "norms": curve}
    if store.is_complete:
        line, data["repeatability"] = told(store, n * t * k * len(store.checkpoints), repeatability, url)
        lines += [line, f"to query it: retrac-scale index {url} index.zarr, then retrac-scale query index.zarr QUERIES"]
    else:
        lines.append("not complete: repeat the sketch that began it, it computes only what is missing")
    return "\n".join(lines), data | {"complete": store.is_complete}


VERB = Verb(
    "info",
    "Say what is in a store or an index.",
    """  retrac-scale info demo/sketches.zarr          a store: checkpoints, samples, timesteps, what is committed,
                                                and how far another run would agree with it
  retrac-scale info demo/retrac.zarr            an index: its estimator and size
  retrac-scale info s3://bucket/sketches.zarr   any fsspec URL""",
    _options,
    _run,
)
