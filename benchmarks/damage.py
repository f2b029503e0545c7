"""Random damage to a store and its indexes: every one named or harmless, and no answer changed in silence.

    python -m benchmarks.damage --count 10000            # of each of the store, and of the indexes
    python -m benchmarks.damage --seed 17 --count 1      # one of them again

A store that grew by a part, with deleted samples, columns and two checkpoints, an index that grew with it (ReTrac) and
one of a ridge. Each time, one or two objects on the disk are flipped, cut, lengthened, emptied, removed, exchanged with
another one of the same array or of any, or put back as they were before the store grew. Then what was touched is read
as a whole: the store, or an index's answers, filtered and grouped, with its ids and columns. What is not as it was must
be an error that names a file or what to do; anything else is printed. Whether `verify` sees the damage is counted too.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import retrac_scale as rs
from retrac_scale.index.seals import verify_index
from retrac_scale.store import DamagedStoreError, Layout, verify_store

N, GROWN, T, K = 16, 8, 2, 16
NAMED = (DamagedStoreError, rs.IncompleteStoreError, rs.StaleIndexError, FileNotFoundError)
"""Errors that say what is damaged, missing or out of date."""

Files = dict[str, bytes]


def rows(start: int, stop: int) -> dict[str, Any]:
    """Arguments of `append` for some samples."""
    rng = np.random.default_rng(start)
    shape = (stop - start, T)
    return {
        "ids": [f"cats/{number:03d}.png" for number in range(start, stop)],
        "sketches": {name: rng.standard_normal((*shape, K)).astype(np.float32) for name in ("a", "b")},
        "losses": {name: rng.random(shape) for name in ("a", "b")},
        "timesteps": [3, 9],
        "columns": {"year": 1990 + np.arange(start, stop), "artist": [f"artist {n % 7}" for n in range(start, stop)]},
    }


def build(folder: Path) -> tuple[Files, rs.SketchStore]:
    """The store and its indexes; their files before they grew, and queries."""
    with rs.StoreWriter(folder / "s.zarr", layout=Layout(8)) as writer:
        writer.append(**rows(0, N))
    indexes(folder)
    before = contents(folder)
    with rs.StoreWriter(folder / "s.zarr") as writer:
        writer.append(**rows(N, N + GROWN))
    rs.open_store(folder / "s.zarr").delete(["cats/003.png", "cats/018.png"])
    indexes(folder)
    asked = rows(1000, 1003)
    return before, rs.write_store(None, asked["sketches"], timesteps=asked["timesteps"])


def indexes(folder: Path) -> None:
    """Build both, or let them follow the store."""
    store = rs.open_store(folder / "s.zarr")
    rs.build_index(store, rs.ReTrac(), folder / "i.zarr", progress=False)
    rs.build_index(store, rs.TRAK(0.5), folder / "r.zarr", progress=False)


def contents(folder: Path) -> Files:
    """Of all files, by path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def put(folder: Path, name: str, content: bytes | None) -> None:
    """Replace a file as others do, by renaming; None removes it."""
    if content is None:
        (folder / name).unlink(missing_ok=True)
        return
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    new = folder / f"{name}.new"
    new.write_bytes(content)
    new.rename(folder / name)


def harmed(rng: np.random.Generator, files: Files, before: Files, among: list[str]) -> dict[str, bytes | None]:
    """What some random damage makes of one or two files."""
    name = str(rng.choice(among))
    content = bytearray(files[name])
    other = str(rng.choice(among))
    siblings = [one for one in among if one.rpartition("/c/")[0] == name.rpartition("/c/")[0] and "/c/" in one]
    how = rng.integers(8)
    if how == 0 and content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        return {name: bytes(content)}
    if how == 1:
        return {name: bytes(content[: rng.integers(len(content) + 1)])}
    if how == 2:
        return {name: bytes(content) + rng.bytes(int(rng.integers(1, 9)))}
    if how == 3:
        return {name: bytes(len(content))}
    if how == 4:
        return {name: None}
    if how == 5 and siblings:
        other = str(rng.choice(siblings))
    if how == 6 and name in before:
        return {name: before[name]}
    return {name: files[other], other: files[name]}


def store_read(place: Path, queries: rs.SketchStore) -> list[Any]:
    """All that the store can be asked for."""
    store = rs.open_store(place)
    values: list[Any] = [store.ids, store.weights, store.columns, store.alive, store.fingerprint]
    for name in store.checkpoints:
        values += [store.sketches(name), store.norms(name), store.losses(name), store.timesteps(name)]
    return values


def index_read(place: Path, queries: rs.SketchStore) -> list[Any]:
    """Answers of an index: plain, filtered, grouped; and its ids and columns."""
    values: list[Any] = []
    index = rs.open_index(place)
    plain = index.query(queries, 5, side="both")
    filtered = index.query(queries, 5, where="year >= 2000 and artist != 'artist 3'")
    groups = index.query(queries, 3, group_by="artist")
    for answer in (plain, filtered, groups):
        values += [answer.ids, answer.scores]
    return [*values, index.ids, index.columns]


READ: dict[str, Callable[[Path, rs.SketchStore], list[Any]]] = {
    "s.zarr": store_read, "i.zarr": index_read, "r.zarr": index_read
}  # fmt: skip


def outcome(read: Callable[[], list[Any]], expected: list[Any]) -> str:
    """What became of a reading."""
    try:
        found = read()
    except NAMED:
        return "named"
    except ValueError as error:
        return "named" if type(error) is ValueError and len(str(error)) > 20 else f"bare {error!r}"
    except Exception as error:
        return f"bare {error!r}"
    try:
        np.testing.assert_equal(found, expected)
    except AssertionError:
        return "ANOTHER ANSWER"
    return "harmless"


def seen(place: Path) -> bool:
    """Whether `verify` tells that something is wrong."""
    try:
        return not verify_store(place).is_whole if place.name == "s.zarr" else bool(verify_index(place))
    except (ValueError, FileNotFoundError):
        return True


def run(count: int, first: int) -> dict[str, Counter[str]]:
    """How often what came of so many damages to the store, and again to the indexes, by seeds from the first on."""
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sound"
        before, queries = build(folder)
        files = contents(folder)
        expected = {one: read(folder / one, queries) for one, read in READ.items()}
        for kind in ("store", "indexes"):
            among = [one for one in files if one.startswith("s.zarr") == (kind == "store")]
            counts = found.setdefault(kind, Counter())
            for seed in tqdm(range(first, first + count), desc=kind, unit="damage"):
                damage = harmed(np.random.default_rng(seed), files, before, among)
                damage = {one: new for one, new in damage.items() if new != files[one]}
                if not damage:
                    counts["nothing changed"] += 1
                    continue
                for one, new in damage.items():
                    put(folder, one, new)
                touched = sorted({one.partition("/")[0] for one in damage})
                result = outcome(
                    lambda touched=touched: [READ[one](folder / one, queries) for one in touched],  # type: ignore[misc]
                    [expected[one] for one in touched],
                )
                counts[result.partition(" ")[0] if result.startswith("bare") else result] += 1
                counts["seen by verify"] += any(seen(folder / one) for one in touched)
                if result not in ("named", "harmless"):
                    tqdm.write(f"{kind} {seed}: {', '.join(damage)}: {result}")
                for one in damage:
                    put(folder, one, files[one])
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="damages to the store, and again to the indexes")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = run(options.count, options.seed)
    for kind, counts in found.items():
        print(f"{kind}: " + ", ".join(f"{many:,} {what}" for what, many in counts.most_common()))
    bad = sum(counts[what] for counts in found.values() for what in ("bare", "ANOTHER ANSWER"))
    sys.exit(f"{bad} were neither named nor harmless" if bad else 0)


if __name__ == "__main__":
    main()
