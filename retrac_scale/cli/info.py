"""The verb info."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import open_sketches
from retrac_scale.cli.project import Project, find
from retrac_scale.cli.repeated import told
from retrac_scale.cli.sizes import in_bytes
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    import zarr

    from retrac_scale.store import SketchStore

BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
SAMPLED_BLOCKS = 32
"""About how many blocks of each checkpoint are read for their norms."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="path or fsspec URL")
    parser.add_argument(
        "--repeatability", action="store_true", help="measure how far another run would agree: some seconds to minutes"
    )


def _run(arguments: argparse.Namespace) -> Answer:
    import zarr

    from retrac_scale.store import open_store
    from retrac_scale.store.schema import ATTRIBUTE, zarr_location

    project = find(arguments.config)
    url = arguments.url or project.store
    try:
        root = zarr.open_group(zarr_location(url), mode="r")
    except FileNotFoundError:
        said = f"there is no store or index at {url}." if arguments.url else project.missing(url)
        raise FileNotFoundError(said) from None
    meta = root.attrs.get(ATTRIBUTE)
    if isinstance(meta, dict) and meta.get("what") == "index":
        return _of_index(url, root, meta, arguments.repeatability)
    stores = [open_store(url, measure=measure) for measure in open_store(url).measurements]
    how = f"to query it: retrac-scale index {url} index.zarr, then retrac-scale query index.zarr QUERIES"
    if not arguments.url:
        how = _what_next(project)
    (first, data), *others = [_describe(store, arguments.repeatability) for store in stores]
    lines = first + [line for more, _ in others for line in more if line not in first]
    lines += [how] if all(store.is_complete for store in stores) else []
    return Answer("\n".join(lines), {"what": "store", "measurements": [data, *(more for _, more in others)]})


def _what_next(project: Project) -> str:
    """How a project whose measures are all complete is queried, or why they do not go together yet."""
    try:
        if open_sketches(project).is_complete:
            return "to query it: retrac-scale query, or retrac-scale report"
    except ValueError as error:
        return str(error)
    return "measures hold different samples: run `retrac-scale sketch`, which computes only what is missing"


def _of_index(url: str, root: zarr.Group, meta: dict[str, Any], repeatability: bool) -> Answer:
    """Read from its description alone: opening it for queries would take the libraries that answer them."""
    from retrac_scale.index.segments import segments_of
    from retrac_scale.store.part import measures_in

    segments, measures = segments_of(root, meta), measures_in(meta)
    c, n, k = segments[0].shape[0], sum(one.shape[1] for one in segments), segments[0].shape[2]
    kept = {name: meta.get(name) for name in ("estimator", "measure", "dtype", "store")}
    measured = f", measured by {' and '.join(measures)}" if any(measures) else ""
    lines = [
        f"index of {in_words(kept['estimator'])}",
        f"{n:,} samples, {c} checkpoint{'s' if c > 1 else ''}, {k:,} entries of {meta['dtype']} each: "
        f"{in_bytes(c * n * k * BYTES[meta['dtype']])}",
        f"made from {meta['store']}{measured}",
    ]
    if meta.get("slots", 1) > 1:  # of matched pairing
        line, kept["repeatability"] = told(lambda: _opened(url), repeatability)
        lines.append(line)
    return Answer("\n".join(lines), {"what": "index", "checkpoints": c, "samples": n, "entries": k, **kept})


def _opened(url: str) -> Any:
    from retrac_scale.query.index import open_index

    return open_index(url)


def _describe(store: SketchStore, repeatability: bool) -> tuple[list[str], dict[str, Any]]:
    import numpy as np

    n, t, k = store.shape
    about = {key: store.fingerprint.get(key, "not stated") for key in ("projection", "measure", "timesteps")}
    lines = [
        f"sketch store: {n:,} samples at {t} timesteps, {k:,} entries of {store.meta['dtype']} each",
        *(f"{key}: {in_words(value)}" for key, value in about.items()),
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
    item = BYTES[store.meta["dtype"]]
    size = f"{in_bytes(written * k * item)} of sketches, {4 / item:.0f} times smaller than in float32"
    lines.append(f"{written:,} of {pairs:,} pairs, {size}")
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
        line, data["repeatability"] = told(lambda: store, repeatability)
        lines.append(line)
    else:
        lines.append("not complete: run `retrac-scale sketch` again, it computes only what is missing")
    return lines, data | {"complete": store.is_complete}


def in_words(about: Any) -> str:
    """A description such as {"kind": "LowRank", "dim": 512} as LowRank, dim 512."""
    if isinstance(about, list):
        return "; ".join(map(in_words, about))
    if not isinstance(about, dict):
        return str(about)
    rest = {
        key: value
        for key, value in about.items()
        if key not in ("kind", "digest", "revision") and value not in (None, False)
    }
    words = [key if value is True else f"{key} {in_words(value)}" for key, value in rest.items()]
    return ", ".join([str(about["kind"]), *words] if "kind" in about else words)


VERB = Verb(
    "info",
    "Say what is in a store or an index.",
    """  retrac-scale info demo/sketches.zarr          a store: checkpoints, samples, timesteps, what is committed
  retrac-scale info demo/sketches.zarr --repeatability     and how far another run would agree with it
  retrac-scale info demo/retrac.zarr            an index: its estimator and size
  retrac-scale info s3://bucket/sketches.zarr   any fsspec URL""",
    _options,
    _run,
)
