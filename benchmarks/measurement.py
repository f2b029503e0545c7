"""What takes the noise out of an answer: noise, pairing, estimator, timesteps, entries, checkpoints, baselines.

    python -m benchmarks.measurement --setting digits8
    python -m benchmarks.measurement --setting emoji16 --folder FOLDER     # of the emoji tarballs
    python -m benchmarks.measurement --setting digits8 --only rows dampings

needs the truth SETTING-lds; `python -m benchmarks.truths` makes it anew. The model that is asked about is
trained first (minutes) unless it is there; sketches are kept as well. For every row: LDS on held-out, training and
generated queries, of the score and of its square, with intervals over queries and subsets; what two halves of the
measurements agree on; how specific the lists are; whether the originals of altered training images come first; pairs,
bytes and seconds. Tables go to benchmarks/results/measurement-SETTING.md, their numbers to .json, pictures to docs/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name, page, pictures
from benchmarks.truths import HERE, KINDS_OF_LDS, QUERIES
from benchmarks.yardstick_lab import Measurement, forward_features, scores_of
from benchmarks.yardstick_methods import DAMPINGS
from retrac_scale import evaluate
from retrac_scale.estimators import Estimator
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate import Interval
from retrac_scale.evaluate.originals import ALTERED, alter
from retrac_scale.evaluate.settings import SETTINGS, Images

RECIPE = "common, 4 x 512, ReTracRidge"
OWN = {"digits8": (10, 32, 100), "emoji16": (10, 32)}
"""Timesteps under own noise, at 4096 entries."""
WIDEST = 2**16


@dataclass(frozen=True)
class Row:
    """A row of the table: what is asked of which measurement."""

    noise: str
    name: str
    measurement: str
    estimator: Estimator


def measurements(setting: str) -> dict[str, Measurement]:
    """All that is sketched, by name."""
    own = {count: Measurement(rs.EvenlySpaced(count, noise="own"), rs.CountSketch(4096)) for count in OWN[setting]}
    return {
        "common 4 x 512": Measurement(rs.EvenlySpaced(4)),
        **{
            f"common {count} x 512": Measurement(rs.EvenlySpaced(count), rs.LowRank(dim=512))
            for count in (1, 2, 8, 16, 32)
        },
        **{f"common 4 x {dim}": Measurement(rs.EvenlySpaced(4), rs.CountSketch(dim)) for dim in (128, 256, 4096)},
        "common 4 x 512, four checkpoints": Measurement(rs.EvenlySpaced(4), every=True),
        "common 4 x 512, from 1 to T - 1": Measurement(rs.Explicit([1, 334, 666, 999])),
        "common 4 x 512, early": Measurement(rs.Explicit([50, 150, 250, 400])),
        "common 4 x 512, two draws": Measurement(rs.EvenlySpaced(4, draws=2)),
        "common, again": Measurement(rs.EvenlySpaced(4, seed=1)),
        "own 4 x 512": Measurement(rs.EvenlySpaced(4, noise="own"), rs.LowRank(dim=512)),
        "own 10 x 2048": Measurement(rs.EvenlySpaced(10, noise="own"), rs.LowRank(dim=2048)),
        **{f"own {count} x 4096": how for count, how in own.items()},
        "recorded": Measurement(None, rs.CountSketch(4096), every=True, queries=rs.EvenlySpaced(20, noise="own")),
    }


def rows(setting: str) -> list[Row]:
    """The table."""
    ridge = rs.ReTracRidge()
    return [
        Row("common", RECIPE, "common 4 x 512", ridge),
        Row("common", "ridge over gradients, matched", "common 4 x 512", rs.TRAK(pairing="matched")),
        Row("common", "TRAK (mean gradients)", "common 4 x 512", rs.TRAK()),
        Row("common", "TRAK of directions", "common 4 x 512", rs.TRAK(directions=True)),
        Row("common", "ReTrac, matched", "common 4 x 512", rs.ReTrac("matched")),
        Row("common", "ReTrac", "common 4 x 512", rs.ReTrac()),
        Row("common", "TracIn, matched", "common 4 x 512", rs.TracIn("matched")),
        *(Row("common", f"{t} x 512, ReTracRidge", f"common {t} x 512", ridge) for t in (1, 2, 8, 16, 32)),
        *(Row("common", f"4 x {k}, ReTracRidge", f"common 4 x {k}", ridge) for k in (128, 256, 4096)),
        *(
            Row("common", f"4 x 512, {what}, ReTracRidge", f"common 4 x 512, {what}", ridge)
            for what in ("four checkpoints", "from 1 to T - 1", "early", "two draws")
        ),
        Row("other for queries", "4 x 512, ReTracRidge", "common 4 x 512", ridge),
        Row("own", "4 x 512, ReTracRidge", "own 4 x 512", ridge),
        Row("own", "10 x 2048, ReTrac (the README's until now)", "own 10 x 2048", rs.ReTrac()),
        Row("own", "10 x 4096, TracIn", "own 10 x 4096", rs.TracIn()),
        Row("own", "10 x 4096, ReTrac", "own 10 x 4096", rs.ReTrac()),
        Row("own", "10 x 4096, TRAK", "own 10 x 4096", rs.TRAK()),
        Row("own", "10 x 4096, ReTracRidge", "own 10 x 4096", ridge),
        *(
            Row("own", f"{t} x 4096, {name}", f"own {t} x 4096", estimator)
            for t in OWN[setting][1:]
            for name, estimator in (("ReTrac", rs.ReTrac()), ("TRAK", rs.TRAK()))
        ),
        Row("own", "32 x 4096, ReTracRidge", "own 32 x 4096", ridge),
        Row("the training's", "recorded, TracIn", "recorded", rs.TracIn()),
        Row("the training's", "recorded, ReTrac", "recorded", rs.ReTrac()),
    ]


class Bench:
    """A setting's model with its sketches, kept in a folder, and the losses of its retrained models."""

    def __init__(self, name: str, folder: Path | None, work: Path) -> None:
        self.name, self.truth = name, evaluate.setting(name, folder=folder, work=work)
        self.folder = work / name / "measurement"
        self.kinds = measurements(name)
        known = evaluate.truth(f"{name}-lds")
        assert isinstance(known, evaluate.Subsets)
        self.members = known.members
        self.losses = {kind: known.losses[:, rows] for kind, rows in known.rows.items()}

    @cached_property
    def task(self) -> rs.DiffusionTask:
        """What is differentiated."""
        return rs.DiffusionTask(self.truth.build(), self.truth.scheduler)

    @cached_property
    def altered(self) -> Images:
        """Training images, each altered in all of `ALTERED` ways, `[5 q, ...]`."""
        images = self.truth.queries["training"].images
        return Images(torch.cat([alter(images, how) for how in ALTERED]), "altered")

    def sketched(self, name: str) -> tuple[rs.SketchStore, dict[str, rs.SketchStore]]:
        """The training samples and the queries of each kind."""
        how, last = self.kinds[name], list(self.truth.checkpoints)[-1]
        checkpoints = self.truth.checkpoints if how.every else {last: self.truth.checkpoints[last]}
        options: dict[str, Any] = {"checkpoints": checkpoints, "batch_size": 64, "progress": False}
        plan = how.plan or rs.Recorded(self.truth.record)
        place, file = self.folder / f"{name}.zarr", self.folder / f"{name}.json"
        started = time.process_time()
        fresh = not place.exists()
        store = rs.sketch(
            self.task, self.truth.pictures.train, place, timesteps=plan, projection=how.projection, **options
        )
        if fresh:
            file.write_text(json.dumps({"seconds": time.process_time() - started}))
        asked = {**{kind: self.truth.queries[kind] for kind in KINDS_OF_LDS}, "altered": self.altered}
        queries = {
            kind: rs.sketch(
                self.task,
                images,
                self.folder / f"{name}, {kind}.zarr",
                timesteps=how.queries or how.plan,
                like=store,
                **options,
            )
            for kind, images in asked.items()
        }
        return store, queries

    def seconds(self, name: str) -> float:
        """CPU time that sketching the training samples took."""
        file = self.folder / f"{name}.json"
        return float(json.loads(file.read_text())["seconds"]) if file.exists() else float("nan")

    def judged(self, values: dict[str, Any]) -> dict[str, Any]:
        """LDS of scores by kind of query, plain and squared, tracing of altered images, unique fraction."""
        line: dict[str, Any] = {}
        for kind, losses in self.losses.items():
            line[f"LDS, {kind}"] = evaluate.lds_mean(values[kind], self.members, losses)
            line[f"squared, {kind}"] = evaluate.lds_mean(values[kind] ** 2, self.members, losses)
        top = np.argsort(-values["generated"], axis=1, kind="stable")[:, :10]
        line["unique fraction"] = evaluate.unique_fraction(top)
        for number, how in enumerate(ALTERED):
            part = values["altered"][number * QUERIES : (number + 1) * QUERIES]
            own = np.arange(len(part))
            line[f"{how} first"] = float(((part > part[own, own][:, None]).sum(1) == 0).mean())
        return line


def table(bench: Bench) -> Iterator[dict[str, Any]]:
    """A line for each row and baseline."""
    for row in rows(bench.name):
        store, queries = bench.sketched(row.measurement)
        index = rs.build_index(store, row.estimator, None)
        if row.noise == "other for queries":  # which query() refuses
            _, asked = bench.sketched("common, again")
            values = {kind: scores_of(index, index.rows_of(one)) for kind, one in asked.items()}
        else:
            values = {kind: scores_of(index, index.query_rows(one)) for kind, one in queries.items()}
        line = {"noise": row.noise, "method": row.name, **cost(bench, row, store), **bench.judged(values)}
        if row.noise != "other for queries":
            line |= repeated(store, queries["held out"], row.estimator, "")
            line |= repeated(store, queries["generated"], row.estimator, ", generated")
        yield line
    yield from baselines(bench)


def cost(bench: Bench, row: Row, store: rs.SketchStore) -> dict[str, Any]:
    """Pairs and bytes of a training sample, and CPU seconds for all."""
    _, t, k = store.shape
    pairs = len(store.checkpoints) * t * bench.kinds[row.measurement].plan.draws if row.noise != "the training's" else t
    count = len(store.checkpoints) * t
    return {"pairs": max(pairs, count), "bytes": count * k, "seconds": bench.seconds(row.measurement)}


def repeated(store: rs.SketchStore, queries: rs.SketchStore, estimator: Estimator, tag: str) -> dict[str, Any]:
    """What two halves share, and what is foretold for two whole runs; nothing where rows are too wide."""
    if estimator.width(store) > WIDEST:
        return {}
    try:
        found = rs.repeatability(store, queries, estimator)
    except rs.MeasuredOnceError:
        return {}
    return {
        f"halves{tag}": found.halves,
        f"foretold{tag}": found.overlap,
        f"rank correlation{tag}": found.rank_correlation,
    }


def baselines(bench: Bench) -> Iterator[dict[str, Any]]:
    """Scores without gradients: pixels, activations and outputs under common noise with a ridge, loss, chance."""
    asked = {**{kind: bench.truth.queries[kind] for kind in KINDS_OF_LDS}, "altered": bench.altered}
    every = {"train": bench.truth.pictures.train, **asked}
    pixels = {kind: one.images.flatten(1).numpy().astype(np.float64) for kind, one in every.items()}
    mean = pixels["train"].mean(0)
    centred = {kind: x - mean for kind, x in pixels.items()}
    unit = {kind: x / np.linalg.norm(x, axis=1, keepdims=True) for kind, x in centred.items()}
    none = {"noise": "-", "pairs": 0}
    yield none | {"method": "pixels, centred cosine"} | bench.judged({k: unit[k] @ unit["train"].T for k in asked})

    def ridge(features: dict[str, Any], estimator: Estimator) -> dict[str, Any]:
        t = features["train"].shape[1]
        stores = {k: rs.write_store(None, {"f": x}, timesteps=range(t), dtype="float32") for k, x in features.items()}
        index = rs.build_index(stores["train"], estimator, None, dtype="float32")
        judged = bench.judged({kind: scores_of(index, index.query_rows(stores[kind])) for kind in asked})
        return judged | repeated(stores["train"], stores["held out"], estimator, "")

    yield none | {"method": "pixel ridge"} | ridge({k: x[:, None] for k, x in pixels.items()}, rs.TRAK())
    for name, features in forward_features(bench.truth.model, bench.truth.scheduler, every).items():
        yield {"noise": "common", "pairs": 4, "method": f"{name}, same ridge"} | ridge(features, rs.ReTracRidge())
    store, _ = bench.sketched("common 4 x 512")
    loss = store.losses(store.checkpoints[0]).mean(1).astype(np.float64)
    yield (
        none
        | {"method": "mean loss of the sample", "pairs": 4}
        | bench.judged(
            {kind: np.tile(loss, (len(one), 1)) + 1e-9 * np.arange(len(loss)) for kind, one in asked.items()}
        )
    )
    rng = np.random.default_rng(0)
    yield (
        none
        | {"method": "random"}
        | bench.judged({kind: rng.standard_normal((len(one), len(loss))) for kind, one in asked.items()})
    )


def dampings(bench: Bench) -> list[dict[str, Any]]:
    """The recipe's LDS by damping, its repeatability, and how near the automatic one comes to the best of 27."""
    store, queries = bench.sketched("common 4 x 512")

    def line(damping: Any) -> dict[str, Any]:
        index = rs.build_index(store, rs.ReTracRidge(damping), None, dtype="float32")
        found: dict[str, Any] = {"damping": damping}
        for kind, losses in bench.losses.items():
            values = scores_of(index, index.query_rows(queries[kind]))
            for name, one in (("signed", values), ("squared", values**2)):
                found[f"{kind}, {name}"] = float(np.nanmean(evaluate.lds(one, bench.members, losses)))
        found["halves"] = rs.repeatability(store, queries["held out"], rs.ReTracRidge(damping)).halves.value
        return found

    lines = [line(damping) for damping in DAMPINGS]
    auto = line("auto")
    best = {"damping": f"auto ({AUTO:g}) / best of {len(DAMPINGS)}"} | {
        key: auto[key] / max(one[key] for one in lines) for key in auto if key != "damping"
    }
    return [*lines, auto, best]


def forecasts(bench: Bench) -> list[dict[str, Any]]:
    """What runs of T timesteps foretell for two runs of m, and what two such runs then share."""
    lines = []
    for kind in ("held out", "generated"):
        found = {}
        for t in (4, 8, 16, 32):
            store, queries = bench.sketched(f"common {t} x 512")
            found[t] = rs.repeatability(store, queries[kind], rs.ReTracRidge())
        for t in (4, 8):
            for m in (8, 16):
                told = found[t].foretold(m)
                lines.append(
                    {"queries": kind, "from T": t, "runs of": m, "foretold": told, "found": found[2 * m].halves}
                )
    first, again = (bench.sketched(name) for name in ("common 4 x 512", "common, again"))
    for kind in ("held out", "generated"):
        lists = [
            rs.build_index(store, rs.ReTracRidge(), None).query(queries[kind], 10).ids
            for store, queries in (first, again)
        ]
        share = [len(np.intersect1d(a, b)) / 10 for a, b in zip(*lists, strict=True)]
        told = rs.repeatability(first[0], first[1][kind], rs.ReTracRidge()).overlap
        lines.append(
            {"queries": kind, "from T": 4, "runs of": 4, "foretold": told, "found": evaluate.bootstrap(np.mean, share)}
        )
    return lines


PARTS: dict[str, Callable[[Bench], Any]] = {"rows": table, "dampings": dampings, "forecasts": forecasts}


def plain(value: Any) -> Any:
    """For JSON."""
    return asdict(value) if isinstance(value, Interval) else float(value)


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits8")
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models and sketches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.setting, options.folder, options.work)
    file = HERE / "results" / f"measurement-{options.setting}.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    report |= {
        "command": f"python -m benchmarks.measurement --setting {options.setting}",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "subsets": len(bench.members),
        "samples": len(bench.truth.train),
        "queries": QUERIES,
    }
    for part in options.only:
        found = []
        for line in PARTS[part](bench):
            found.append(json.loads(json.dumps(line, default=plain)))
            print(
                json.dumps(
                    {
                        key: value if not isinstance(value, dict) else round(value["value"], 3)
                        for key, value in found[-1].items()
                    }
                ),
                flush=True,
            )
        report[part] = found
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(page(report))
    pictures(report, options.setting, HERE.parent / "docs")


if __name__ == "__main__":
    main()
