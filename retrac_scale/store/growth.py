"""Growing a store: samples, checkpoints, timesteps, measures added in parts of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.columns import check_columns, column_types
from retrac_scale.store import objects
from retrac_scale.store.compatibility import compared, kept_alike
from retrac_scale.store.encoding import Dtype
from retrac_scale.store.opening import PARTS, WHAT, open_parts, open_root
from retrac_scale.store.part import ROOT, group_json, lay_out, plans_of
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import Layout, Url, differences, digest_of
from retrac_scale.store.writer import begin, describe, mismatch, unfinished

Describe = Callable[[npt.NDArray[Any], Sequence[str]], Mapping[str, Any]]
"""The fingerprint of some samples at some checkpoints."""


def grow_store(
    out: Url,
    *,
    pairs: tuple[int, int],
    ids: npt.NDArray[Any],
    weights: Mapping[str, float],
    describe_part: Describe,
    dtype: Dtype,
    quantities: Sequence[str] = ("loss", "timestep"),
    columns: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> list[SketchStore]:
    """Lay out what an existing store lacks of a description, and return the parts that make it up.

    Nothing that is there is rewritten. Samples are known by their ids: those that are new stand in a part of their own,
    and so do checkpoints, timestep plans and measures that are new for samples the store has.

    Args:
        out: path or fsspec URL of the store.
        pairs: (t, k) of what is asked for.
        ids: samples `[n]`: all, or none, of those that were added together, in their order, then new ones.
        weights: w_c per checkpoint; those of a part are given together or not at all.
        describe_part: the fingerprint of some samples at some checkpoints.
        dtype: as the store's.
        quantities: as the store's.
        columns: `{name: [n]}`, the store's names.
        plan: how blocks of the new parts are computed.
        layout: of new samples; None: as the store's.

    Returns:
        the parts, each of them a store whose ids and checkpoints are among those given; fill those not complete.

    Raises:
        ValueError: what is there contradicts what is given; says what differs.
    """
    root = open_root(out, WHAT, "r+")
    parts = [SketchStore([part], out, root) for part in open_parts(root, out)]
    checked = check_columns(columns, len(ids))
    names = list(weights)
    fingerprint = describe_part(ids, names)
    types = column_types(ids, checked)
    whole = describe(out, (len(ids), *pairs), weights, fingerprint, dtype, quantities, types, plan, layout)
    _check_alike(parts, fingerprint, whole, out)
    filled: list[SketchStore] = []
    new = 0
    for rows in _segments(parts, ids, out):
        here = [part for part in parts if np.array_equal(part.ids, ids[rows])]
        own = {name: values[rows] for name, values in checked.items()}
        size = Layout(here[0].meta["block_samples"], here[0].meta["chunk_samples"]) if here else layout
        size = size or Layout(parts[0].meta["block_samples"], parts[0].meta["chunk_samples"])

        def wanted(held: Sequence[str], rows: Any = rows, own: Any = own, size: Any = size) -> dict[str, Any]:
            weight_of = {name: weights[name] for name in held}
            described = describe_part(ids[rows], held)
            return describe(out, (len(rows), *pairs), weight_of, described, dtype, quantities, types, plan, size)

        missing = names
        for part in here:
            held = [name for name in part.checkpoints if name in weights]
            if not held or not _same_pairs(part.fingerprint, fingerprint):
                continue
            if len(held) < len(part.checkpoints):
                _refuse(out, [f"checkpoint {next(n for n in part.checkpoints if n not in weights)!r} is not given"])
            if found := mismatch(part, wanted(held), ids[rows], own):
                _refuse(out, found)
            filled.append(part)
            missing = [name for name in missing if name not in held]
        if missing:
            deleted = np.logical_or.reduce([part.deleted for part in here]) if here else None
            meta = wanted(missing)
            filled.append(_add(root, out, len(parts) + new, meta, lay_out(meta, ids[rows], own, deleted)))
            new += 1
    return filled


def _check_alike(
    parts: Sequence[SketchStore], fingerprint: Mapping[str, Any], meta: Mapping[str, Any], out: Url
) -> None:
    """Refuse what cannot stand in one store: another projection, another checkpoint of the same name, ..."""
    names = list(meta["checkpoints"])
    for part in parts:
        shared = [name for name in part.checkpoints if name in names]
        told = compared("grow", part.fingerprint, fingerprint)
        held = part.meta["quantities"]
        stored, given = (
            agree
            | {key: {name: print_.get(key, {}).get(name) for name in shared} for key in ("checkpoints", "precondition")}
            | {"weights": {name: weights[name] for name in shared}}
            | {key: described[key] for key in ("dtype", "columns")}
            | {"quantities": quantities}
            for agree, print_, weights, described, quantities in (
                (told[0], part.fingerprint, part.weights, part.meta, held),
                (told[1], fingerprint, meta["checkpoints"], meta, kept_alike(held, meta["quantities"])),
            )
        )
        if found := differences(stored, given):
            _refuse(out, found)


def _refuse(out: Url, found: Sequence[str]) -> None:
    raise ValueError(f"{out} cannot grow by this: {'; '.join(found)}; choose another path.")


def _same_pairs(stored: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return plans_of(stored) == plans_of(given) and stored.get("measure") == given.get("measure")


def _segments(parts: Sequence[SketchStore], ids: npt.NDArray[Any], out: Url) -> list[npt.NDArray[np.int64]]:
    """Rows of the given ids that were added together, in the store's order, and last those that are new."""
    row_of = {sample: row for row, sample in enumerate(ids.tolist())}
    known: dict[str, npt.NDArray[np.int64]] = {}
    for part in parts:
        rows = [row_of.get(sample, -1) for sample in part.ids.tolist()]
        given = sum(row >= 0 for row in rows)
        if given == len(rows):
            known[part.only_part.same_samples] = np.array(rows)
        elif given:
            lacking = part.ids[rows.index(-1)]
            _refuse(out, [f"sample {lacking} was added together with others that are given, but is not given itself"])
    segments = list(known.values())
    new = np.setdiff1d(np.arange(len(ids)), np.concatenate(segments) if segments else [])
    return [*segments, new] if len(new) else segments


def _add(root: zarr.Group, out: Url, number: int, meta: Mapping[str, Any], laid_out: Mapping[str, Any]) -> SketchStore:
    """Write an empty part under a name made of its number and its content: the same growth has the same name."""
    name = f"{number:04d}-{digest_of(laid_out[ROOT])[:8]}"
    objects.write_all(root, {f"{PARTS}/{ROOT}": b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'})
    objects.write_new(root, f"{PARTS}/{name}/{ROOT}", group_json(unfinished(meta)))
    begin(root, {f"{PARTS}/{name}/{key}": value for key, value in laid_out.items()}, f"{PARTS}/{name}/{ROOT}")
    return SketchStore([part for part in open_parts(root, out) if part.name == name], out, root)
