"""The experiments of arXiv 2401.09031 at digits size, and LDS for every estimator.

    python -m benchmarks.paper            # everything; run again, it trains and sketches only what is missing
    python -m benchmarks.paper --only ab  # some parts
    python -m benchmarks.paper --tiny     # minutes: does it run?

(a) gradient norm against timestep; (b) specificity and hubness of TracIn and ReTrac; (c) planted outliers by
self-influence; (d) training images as their own queries; (e) LDS of every estimator, and of 27 dampings; (f) retraining
without the top samples. Tables go to benchmarks/results/paper.md, their numbers to paper.json, figures beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import retrac_scale as rs
from benchmarks.digits import (
    SAMPLING_STEPS,
    Losses,
    Trainer,
    Training,
    build,
    digits,
    generate,
    sampler,
    scheduler,
    start,
)
from benchmarks.paper_page import draw, page, table
from retrac_scale import demo, evaluate
from retrac_scale.evaluate import Interval
from retrac_scale.report.figures import norm_curve

HERE = Path(__file__).parent
DAMPINGS = [factor * 10.0**power for power in range(-6, 3) for factor in (1, 2, 5)]
TRACED = {"TracIn": rs.TracIn(), "ReTrac": rs.ReTrac()}


@dataclass(frozen=True)
class Setting:
    """All parameters of a run."""

    seed: int = 0
    samples: int = 1000  # digits to train on; the others are held out
    queries: int = 100  # validation digits, and as many generated ones
    training: Training = field(default_factory=Training)
    timesteps: int = 10  # evenly spaced, of queries and of training samples that have none recorded
    demo_timesteps: int = 5  # the same for the demo's model
    dim: int = 4096
    lengths: tuple[int, ...] = (5, 10, 50)
    share: float = 0.2  # of the lists, from which on a sample counts as generally influential
    subsets: int = 32
    removed: int = 100
    removal_queries: int = 3


TINY = Setting(samples=100, queries=8, training=Training(epochs=4, kept=(2, 4)), timesteps=4, subsets=4, removed=10)


@dataclass(frozen=True)
class Images:
    """A dataset whose ids begin with a word: noise depends on the id, and queries have their own."""

    images: Tensor
    word: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.images[row]

    @property
    def ids(self) -> list[Any]:
        """Sample ids."""
        return list(range(len(self))) if self.word is None else [f"{self.word}-{row}" for row in range(len(self))]


@dataclass(frozen=True, eq=False)
class Study:
    """A trained model with its data; sketches are made once and kept in a folder.

    Attributes:
        name: of the model.
        folder: for sketches.
        model: of the checkpoints' kind.
        train: the images that it was trained on.
        checkpoints: {name: weights}.
        record: the folder of the training record.
        grid: the averaged timesteps.
        queries: {kind: images}.
        dim: of the sketches.
    """

    name: str
    folder: Path
    model: Any
    train: Tensor
    checkpoints: dict[str, Any]
    record: Path
    grid: rs.EvenlySpaced
    queries: dict[str, Tensor]
    dim: int

    @property
    def last(self) -> dict[str, Any]:
        """The last checkpoint alone."""
        return dict([list(self.checkpoints.items())[-1]])

    def sketch(
        self,
        name: str,
        data: Images,
        timesteps: Any = None,
        measure: Any = "mse",
        like: rs.SketchStore | None = None,
        checkpoints: Any = None,
    ) -> rs.SketchStore:
        """Sketches of some images, kept under the name."""
        return rs.sketch(
            rs.DiffusionTask(self.model, scheduler(), measure=measure),
            data,
            self.folder / f"{name}.zarr",
            checkpoints=checkpoints or self.checkpoints,
            timesteps=timesteps or self.grid,
            projection=rs.CountSketch(self.dim) if like is None else None,
            batch_size=64,
            like=like,
            progress=False,
        )

    def averaged(
        self, measure: str = "mse", checkpoints: Any = None, tag: str = ""
    ) -> tuple[rs.SketchStore, dict[str, rs.SketchStore]]:
        """The training samples over the grid, and the queries of each kind."""
        stored = self.sketch(f"averaged-{measure}{tag}", Images(self.train), None, measure, None, checkpoints)
        asked = {
            kind: self.sketch(f"{kind}-{measure}{tag}", Images(images, kind), None, measure, stored, checkpoints)
            for kind, images in self.queries.items()
        }
        return stored, asked

    @cached_property
    def recorded(self) -> rs.SketchStore:
        """The training samples at the timesteps that they were trained at."""
        return self.sketch("recorded", Images(self.train), rs.Recorded(self.record))

    @cached_property
    def scores(self) -> dict[tuple[str, str, str], Any]:
        """Of TracIn and ReTrac, `[q, n]`, by (estimator, timesteps of the training side, kind of queries)."""
        stored, queries = self.averaged()
        return {
            (name, mode, kind): scores(store, estimator, asked)
            for name, estimator in TRACED.items()
            for mode, store in (("recorded", self.recorded), ("averaged", stored))
            for kind, asked in queries.items()
        }


class Lab:
    """The two models, and the many that are trained on subsets; made once and kept in a folder."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.images = digits(setting.seed)
        self.trainer = Trainer(self.images[: setting.samples], setting.training, folder / "models")
        self.ids = np.arange(setting.samples)

    @cached_property
    def small(self) -> Study:
        """8 x 8 digits, a U-Net of 0.18 M parameters: one of many trainings."""
        how = self.setting
        checkpoints = self.trainer.checkpoints(self.ids, how.seed, self.folder / "record")
        weights, model = list(checkpoints.values())[-1], build(how.training)
        queries = {
            "validation": self.images[how.samples :][: how.queries],
            "generated": generate(model, weights, how.queries, self.folder / "generated.pt"),
        }
        record, grid = self.folder / "record", rs.EvenlySpaced(how.timesteps)
        return Study("8 x 8", self.folder, model, self.trainer.images, checkpoints, record, grid, queries, how.dim)

    @cached_property
    def scans(self) -> demo.Scans:
        """The demo's 1,797 digits and 36 photograph patches at 16 x 16."""
        return demo.load_scans()

    @cached_property
    def large(self) -> Study:
        """The demo's model and training."""
        folder, how = self.folder / "demo", self.setting
        model = demo.build_model()
        files = demo.train(model, scheduler(), self.scans, folder)
        weights = torch.load(list(files.values())[-1], weights_only=True)["model"]
        queries = {"generated": generate(model, weights, how.queries, folder / "generated.pt")}
        grid = rs.EvenlySpaced(how.demo_timesteps)
        return Study(
            "16 x 16", folder, model, self.scans.images, dict(files), folder / "recorded", grid, queries, how.dim
        )

    @cached_property
    def subsets(self) -> tuple[Any, dict[str, Any]]:
        """Members `[m, n]` of half-size subsets, and the losses `[m, q]` of each kind of query of the small model."""
        how = self.setting
        members = evaluate.random_subsets(how.samples, how.subsets, seed=how.seed)
        queries = self.small.queries
        measure = Losses(torch.cat(list(queries.values())), how.training)
        chosen = [self.ids[row] for row in members]
        losses = evaluate.retrain(chosen, self.trainer, measure, self.folder / "subsets", seed=how.seed)
        return members, dict(zip(queries, np.split(losses, len(queries), axis=1), strict=True))


def scores(store: rs.SketchStore, estimator: Any, queries: rs.SketchStore) -> Any:
    """`[q, n]`, from float32 rows."""
    return np.asarray(rs.build_index(store, estimator, None, dtype="float32").scores(queries))


def top(values: Any, k: int) -> Any:
    """The best k samples of each query, `[q, k]`."""
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def mean_norms(store: rs.SketchStore) -> Any:
    """Each sample's gradient norm, averaged over timesteps and, with their weights, over checkpoints, `[n]`."""
    return sum(weight * store.norms(name).mean(1) for name, weight in store.weights.items())


def norms(lab: Lab) -> list[dict[str, Any]]:
    """(a) Gradient norm by timestep."""
    return [
        {"model": study.name, "timestep": round(float(t)), "mean": float(m), "standard deviation": float(d)}
        for study in (lab.large, lab.small)
        for t, m, d in zip(*norm_curve(study.recorded), strict=True)
    ]


def specificity(lab: Lab) -> list[dict[str, Any]]:
    """(b) TracIn against ReTrac on generated queries."""
    share = lab.setting.share
    lines: list[dict[str, Any]] = []
    for study in (lab.large, lab.small):
        for mode, store in (("recorded", study.recorded), ("averaged", study.averaged()[0])):
            values = {name: study.scores[name, mode, "generated"] for name in TRACED}
            length = mean_norms(store)
            correlation = {
                name: evaluate.bootstrap(
                    lambda x, y: evaluate.norm_correlation(x.T, y), values[name].T, length, draws=300
                )
                for name in TRACED
            }
            for k in lab.setting.lengths:
                lists = {name: top(values[name], k) for name in TRACED}
                where = {"model": study.name, "timesteps": mode, "k": k}
                for name, ids in lists.items():
                    lines.append(
                        where
                        | {
                            "estimator": name,
                            "unique fraction": evaluate.jackknife(evaluate.unique_fraction, ids),
                            "hubs": evaluate.bootstrap(lambda x: evaluate.hubs(x, share), ids),
                            "largest share": evaluate.largest_share(ids),
                            "norm correlation": correlation[name],
                        }
                    )
                lines.append(
                    where
                    | {
                        "estimator": "ReTrac / TracIn",
                        "unique fraction": evaluate.jackknife(
                            lambda a, b: evaluate.unique_fraction(b) / evaluate.unique_fraction(a), *lists.values()
                        ),
                        "hubs": evaluate.bootstrap(
                            lambda a, b: evaluate.hubs(b, share) / max(1, evaluate.hubs(a, share)), *lists.values()
                        ),
                    }
                )
    return lines


def outliers(lab: Lab) -> list[dict[str, Any]]:
    """(c) Photograph patches among the digits, found by self-influence."""
    planted, study = lab.scans.is_outlier, lab.large
    recorded, averaged = study.recorded, study.averaged()[0]
    measured = {
        f"{name}, {mode}": rs.self_influence(store, estimator, queries=queries)
        for name, estimator in TRACED.items()
        for mode, store, queries in (
            ("recorded timesteps against the grid", recorded, averaged),
            ("averaged timesteps", averaged, None),
        )
    }
    measured["TracIn, recorded timesteps"] = rs.self_influence(recorded, rs.TracIn())
    every = [averaged.losses(name).mean(1) for name in averaged.checkpoints]
    measured["mean loss, no attribution"] = np.mean(every, axis=0)
    return [
        {"score": name} | {metric: over_both_kinds(metric, values, planted) for metric in ("auroc", "auprc", "recall")}
        for name, values in measured.items()
    ]


def over_both_kinds(metric: str, values: Any, planted: Any) -> Interval:
    """A detection metric with a bootstrap interval that resamples planted samples and others apart."""
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(planted), np.flatnonzero(~planted)]
    resampled = []
    for _ in range(500):
        rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
        resampled.append(getattr(evaluate.detection(values[rows], planted[rows]), metric))
    return evaluate.percentiles(getattr(evaluate.detection(values, planted), metric), resampled)


def tracing(lab: Lab) -> list[dict[str, Any]]:
    """(d) Training images as queries with noise of their own: where does each stand in its own list?"""
    own = np.arange(lab.setting.queries)
    lines = []
    for study in (lab.large, lab.small):
        stored = study.averaged()[0]
        queries = study.sketch("traced", Images(study.train[own], "traced"), like=stored)
        for mode, store in (("recorded", study.recorded), ("averaged", stored)):
            for name, estimator in TRACED.items():
                values = scores(store, estimator, queries)
                rank = 1 + (values > values[own, own][:, None]).sum(1)
                lines.append(
                    {
                        "model": study.name,
                        "timesteps": mode,
                        "estimator": name,
                        "first": evaluate.bootstrap(np.mean, rank == 1),
                        "among the first 10": evaluate.bootstrap(np.mean, rank <= 10),
                        "median rank": evaluate.bootstrap(np.median, rank),
                    }
                )
    return lines


def estimators() -> Iterable[tuple[str, Any, str, bool]]:
    """Label, estimator, what is differentiated, and whether all checkpoints are used besides the last alone."""
    yield "TracIn / GradDot", rs.TracIn(), "mse", True
    yield "ReTrac", rs.ReTrac(), "mse", True
    yield "ReTrac, matched timesteps", rs.ReTrac("matched"), "mse", True
    yield "GradCos / GAS", rs.GradCos(), "mse", True
    if not hasattr(rs, "TRAK"):
        return
    yield "TRAK", rs.TRAK(), "mse", True
    yield "TRAK, squared", rs.TRAK(squared=True), "mse", False
    yield "RelatIF", rs.RelatIF(), "mse", True
    yield "RenormIF", rs.RenormIF(), "mse", True
    for measure in rs.DTRAK.measures:
        yield f"D-TRAK, {measure.replace('_', ' ')}", rs.DTRAK(), measure, False
    yield "DAS", rs.DAS(), "mean_output", False


def by_other_queries(study: Study) -> Iterable[tuple[str, dict[str, Any]]]:
    """Label and scores by kind of query of estimators whose queries are not measured as the training side is."""
    if not hasattr(rs, "Journey"):
        return
    stored, _ = study.averaged("mse", study.last, "-last")
    task = rs.DiffusionTask(study.model, scheduler())
    samples = rs.Samples(Images(study.train), task, study.last, study.grid)
    for label, divisors in (
        ("influence function, diagonal Fisher", rs.fisher_divisors(samples)),
        ("influence function, Fisher in eigenbases", rs.kronecker_divisors(samples)),
    ):
        asked = {
            kind: rs.sketch(
                task,
                Images(images, kind),
                None,
                checkpoints=study.last,
                timesteps=study.grid,
                batch_size=64,
                like=stored,
                precondition=divisors,
                progress=False,
            )
            for kind, images in study.queries.items()
        }
        yield label, {kind: scores(stored, rs.GradDot(), queries) for kind, queries in asked.items()}
    task.load("last", next(iter(study.last.values())))
    images = study.queries["generated"]
    whole = rs.sample_journey(task, sampler(), start(len(images), images.shape[-1]), SAMPLING_STEPS)
    if not torch.allclose(whole.samples.clamp(-1, 1), images, atol=1e-3):
        raise RuntimeError("the journey leads to other images than those that were generated.")
    some = slice(0, None, SAMPLING_STEPS // 10)
    ids = Images(images, "journey").ids
    journey = rs.Journey(whole.images[:, some].clamp(-1, 1), whole.timesteps[some], whole.samples, ids=ids)
    queries = rs.sketch_journey(task, journey, checkpoints=study.last, like=stored)
    yield "Journey-TRAK, 10 steps", {"generated": scores(stored, rs.TRAK(), queries)}


def datamodels(lab: Lab) -> list[dict[str, Any]]:
    """(e) LDS of every estimator over half-size subsets."""
    members, losses = lab.subsets
    study = lab.small

    def line(label: str, checkpoints: str, values: dict[str, Any]) -> dict[str, Any]:
        return (
            {"estimator": label, "checkpoints": checkpoints}
            | {kind: evaluate.lds_mean(values[kind], members, losses[kind], draws=500) for kind in values}
            | {"unique fraction at 10": evaluate.jackknife(evaluate.unique_fraction, top(values["generated"], 10))}
        )

    lines = [
        line(f"{name}, recorded timesteps", "all", {kind: study.scores[name, "recorded", kind] for kind in losses})
        for name in TRACED
    ]
    for label, estimator, measure, every in estimators():
        for checkpoints, chosen, tag in (("last", study.last, "-last"), ("all", None, ""))[: 1 + every]:
            stored, queries = study.averaged(measure, chosen, tag)
            lines.append(line(label, checkpoints, {k: scores(stored, estimator, queries[k]) for k in losses}))
    return lines + [line(label, "last", values) for label, values in by_other_queries(study)]


def dampings(lab: Lab) -> list[dict[str, Any]]:
    """(e) LDS of TRAK for 27 dampings and for the one that is chosen without labels; last checkpoint."""
    if not hasattr(rs, "TRAK"):
        return []
    members, losses = lab.subsets
    stored, queries = lab.small.averaged("mse", lab.small.last, "-last")
    lines: list[dict[str, Any]] = []
    for damping in ("auto", *DAMPINGS):
        values = {kind: scores(stored, rs.TRAK(damping), queries[kind]) for kind in losses}
        lines.append(
            {"damping": damping}
            | {kind: float(np.nanmean(evaluate.lds(values[kind], members, losses[kind]))) for kind in losses}
        )
    best = {kind: max(line[kind] for line in lines[1:]) for kind in losses}
    return [*lines, {"damping": "auto / best of 27"} | {kind: lines[0][kind] / best[kind] for kind in losses}]


def removals(lab: Lab) -> list[dict[str, Any]]:
    """(f) The top samples of a generated query removed, the model trained again with the same seed."""
    how, study = lab.setting, lab.small
    values = {name: study.scores[name, "recorded", "generated"] for name in TRACED}
    if hasattr(rs, "TRAK"):
        stored, queries = study.averaged("mse", study.last, "-last")
        values["TRAK"] = scores(stored, rs.TRAK(), queries["generated"])
    lists = {name: top(found, how.removed)[: how.removal_queries] for name, found in values.items()}
    random = np.random.default_rng(how.seed).permutation(how.samples)[: how.removed]
    lists["random, the same for all"] = np.tile(random, (how.removal_queries, 1))
    measure = Losses(study.queries["generated"][: how.removal_queries], how.training)
    lines = []
    for name, ids in lists.items():
        change = evaluate.counterfactual(ids, lab.ids, lab.trainer, measure, lab.folder / "removals", seed=how.seed)
        every = {f"query {number}": float(value) for number, value in enumerate(change)}
        lines.append({"removed": name} | every | {"mean": float(change.mean())})
    return lines


PARTS = {
    "a": [("Gradient norm against timestep, recorded pairs of all checkpoints", norms)],
    "b": [("Specificity: TracIn against ReTrac, generated queries", specificity)],
    "c": [("36 photograph patches planted among the digits, found by self-influence", outliers)],
    "d": [("Training images as their own queries: the rank of the image itself", tracing)],
    "e": [
        ("LDS over half-size subsets, mean over queries", datamodels),
        ("LDS of TRAK by damping, relative to the mean eigenvalue, last checkpoint", dampings),
    ],
    "f": [("Change of a query's loss after removing its top samples and training again", removals)],
}


def plain(value: Any) -> Any:
    """For JSON."""
    return asdict(value) if isinstance(value, Interval) else value


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="abcdef", help="letters of parts")
    parser.add_argument("--tiny", action="store_true", help="a run of minutes, into a folder of its own")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = TINY if options.tiny else Setting()
    work = HERE / ".cache" / ("paper-tiny" if options.tiny else "paper")
    out = work if options.tiny else options.out
    lab = Lab(setting, work)
    file = out / "paper.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"results": {}}
    if report.get("setting", json.loads(json.dumps(asdict(setting)))) != json.loads(json.dumps(asdict(setting))):
        report = {"results": {}}
    report |= {
        "command": "python -m benchmarks.paper",
        "setting": asdict(setting),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one torch thread; torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for letter in options.only:
        for title, part in PARTS[letter]:
            print(f"({letter}) {title}", flush=True)
            lines = json.loads(json.dumps(part(lab), default=plain))
            report["results"][part.__name__] = lines
            print(table(lines), flush=True)
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
    draw(report["results"], DAMPINGS, out)
    titles = {part.__name__: f"({letter}) {title}" for letter, parts in PARTS.items() for title, part in parts}
    (out / "paper.md").write_text(page(report, titles))


if __name__ == "__main__":
    main()
