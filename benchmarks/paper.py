"""The experiments of arXiv 2401.09031 at digits size, and LDS for every estimator.

    python -m benchmarks.paper                        # everything; again, it trains and sketches only what is missing
    python -m benchmarks.paper --only norms tracing   # some parts
    python -m benchmarks.paper --setting tiny-digits  # a minute: does it run?
    python -m benchmarks.paper --setting cifar-10 --folder /data/cifar-10-batches-py
    python -m benchmarks.paper --setting sd-lora --folder /data/captioned-images --model /models/stable-diffusion

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
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from benchmarks.paper_data import LOADERS, Data, captioned
from benchmarks.paper_models import LoRATraining, Losses
from benchmarks.paper_page import draw, page, table
from retrac_scale import demo, evaluate
from retrac_scale.evaluate import Interval
from retrac_scale.evaluate.settings import Images, joined
from retrac_scale.evaluate.settings.generating import SAMPLING_STEPS, beginning, generate
from retrac_scale.evaluate.settings.trainer import Trainer
from retrac_scale.evaluate.settings.training import DEVICE, Training
from retrac_scale.report.figures import norm_curve

HERE = Path(__file__).parent
DAMPINGS = [factor * 10.0**power for power in range(-6, 3) for factor in (1, 2, 5)]
TRACED = {"TracIn": rs.TracIn(), "ReTrac": rs.ReTrac()}
MEASURES = ("mse", *rs.DTRAK.measures, *rs.DAS.measures)


@dataclass(frozen=True)
class Setting:
    """All parameters of a run."""

    data: str = "digits"  # one of paper_data.LOADERS, or "captions"
    seed: int = 0
    samples: int | None = None  # to train on, the first of the data set; None for all
    queries: int = 100  # held-out images, and as many generated ones
    training: Training = field(default_factory=Training)
    timesteps: int = 10  # evenly spaced, of queries and of training samples that have none recorded
    demo_timesteps: int | None = None  # the same for the demo's model, which is studied besides; None leaves it out
    dim: int = 4096
    lengths: tuple[int, ...] = (5, 10, 50)
    share: float = 0.2  # of the lists, from which on a sample counts as generally influential
    subsets: int = 32
    removed: int = 100
    removal_queries: int = 3


def published(data: str, channels: tuple[int, ...], epochs: int = 500) -> Setting:
    """A run on one of the paper's data sets, of its size: a checkpoint every 50 epochs."""
    kept = tuple(range(50, epochs + 1, 50))
    training = Training(epochs, kept, batch=128, learning_rate=2e-4, warmup_steps=500, channels=channels)
    return Setting(data, training=training, timesteps=100, dim=8192, removed=1000)


SETTINGS = {
    "digits": Setting(demo_timesteps=5),
    "tiny-digits": Setting(
        samples=100, queries=8, training=Training(epochs=4, kept=(2, 4)), timesteps=4, subsets=4, removed=10
    ),
    **{data: published(data, (128, 256, 256)) for data in ("cifar-10", "cifar-mnist", "artbench-2", "artbench-10")},
    **{data: published(data, (128, 256, 256, 512), 400) for data in ("artbench-10-64", "tiny-imagenet")},
    "sd-lora": Setting(
        "captions", training=LoRATraining(epochs=100, kept=tuple(range(20, 101, 20))), timesteps=20, dim=8192
    ),
}


@dataclass(frozen=True, eq=False)
class Study:
    """A trained model with its data; sketches are made once and kept in a folder.

    Attributes:
        name: of the model.
        folder: for sketches.
        training: how it was trained.
        model: of the checkpoints' kind.
        train: the images that it was trained on.
        checkpoints: {name: weights}.
        record: the folder of the training record.
        grid: the averaged timesteps.
        queries: {kind: images}.
        dim: of the sketches.
        planted: which training images are outliers, bool `[n]`, where some are.
    """

    name: str
    folder: Path
    training: Training
    model: Any
    train: Images
    checkpoints: dict[str, Any]
    record: Path
    grid: rs.EvenlySpaced
    queries: dict[str, Images]
    dim: int
    planted: Any = None

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
        """Sketches of some images, kept under the name; of several measures the first."""
        return rs.sketch(
            self.task(measure),
            data,
            self.folder / f"{name}.zarr",
            checkpoints=checkpoints or self.checkpoints,
            timesteps=timesteps or self.grid,
            projection=rs.CountSketch(self.dim) if like is None else None,
            batch_size=64,
            like=like,
            progress=False,
        )

    def task(self, measure: Any = "mse") -> rs.DiffusionTask:
        """What is differentiated."""
        return rs.DiffusionTask(self.model, self.training.scheduler(), measure=measure, device=DEVICE)

    def averaged(self, measure: str = "mse", *, last: bool = False) -> tuple[rs.SketchStore, dict[str, rs.SketchStore]]:
        """The training samples over the grid, and the queries of each kind; at the last checkpoint in all measures."""
        measures, checkpoints, tag = (MEASURES, self.last, "-last") if last else ("mse", None, "-mse")
        stored = self.sketch(f"averaged{tag}", self.train, None, measures, None, checkpoints)
        for kind, images in self.queries.items():
            self.sketch(f"{kind}{tag}", images, None, measures, stored, checkpoints)
        opened = [
            rs.open_store(self.folder / f"{name}{tag}.zarr", measure=measure) for name in ("averaged", *self.queries)
        ]
        return opened[0], dict(zip(self.queries, opened[1:], strict=True))

    @cached_property
    def recorded(self) -> rs.SketchStore:
        """The training samples at the timesteps that they were trained at."""
        return self.sketch("recorded", self.train, rs.Recorded(self.record))

    @cached_property
    def recorded_scores(self) -> dict[tuple[str, str], Any]:
        """Of TracIn and ReTrac, `[q, n]`, by (estimator, kind of queries), from recorded timesteps."""
        queries = {
            kind: self.sketch(f"{kind}-mse", images, like=self.recorded) for kind, images in self.queries.items()
        }
        return self._scores(self.recorded, queries)

    @cached_property
    def averaged_scores(self) -> dict[tuple[str, str], Any]:
        """The same from averaged timesteps."""
        return self._scores(*self.averaged())

    def _scores(self, store: rs.SketchStore, queries: dict[str, rs.SketchStore]) -> dict[tuple[str, str], Any]:
        return {
            (name, kind): scores(store, estimator, asked)
            for name, estimator in TRACED.items()
            for kind, asked in queries.items()
        }


class Lab:
    """The trained models, and the many that are trained on subsets; made once and kept in a folder."""

    def __init__(self, setting: Setting, data: Data, folder: Path) -> None:
        self.setting, self.data, self.folder = setting, data, folder
        self.trainer = Trainer(data.train.some(slice(setting.samples)), setting.training, folder / "models")
        self.ids = np.arange(len(self.trainer.images))

    @cached_property
    def main(self) -> Study:
        """The setting's data and training."""
        how, record = self.setting, self.folder / "record"
        checkpoints = self.trainer.checkpoints(self.ids, how.seed, record)
        images, weights = self.trainer.images, list(checkpoints.values())[-1]
        model = how.training.build(images.images.shape[1:])
        asked = self.data.validation.some(slice(how.queries), "validation")
        queries = {
            "validation": asked,
            "generated": generate(how.training, model, weights, asked, self.folder / "generated.pt"),
        }
        return Study(
            name="{2} x {3}".format(*images.images.shape),
            folder=self.folder,
            training=how.training,
            model=model,
            train=images,
            checkpoints=checkpoints,
            record=record,
            grid=rs.EvenlySpaced(how.timesteps),
            queries=queries,
            dim=how.dim,
            planted=self.data.planted,
        )

    @cached_property
    def studies(self) -> list[Study]:
        """The main one, perhaps after the demo's model and training."""
        timesteps = self.setting.demo_timesteps
        return [self.main] if timesteps is None else [self._demo(timesteps), self.main]

    def _demo(self, timesteps: int) -> Study:
        folder, how, scans = self.folder / "demo", self.setting, demo.load_scans()
        model = demo.build_model()
        training, train = Training(), Images(scans.images)
        files = demo.train(model, training.scheduler(), scans, folder)
        weights = torch.load(list(files.values())[-1], weights_only=True)["model"]
        asked = train.some(slice(how.queries))
        return Study(
            name="16 x 16",
            folder=folder,
            training=training,
            model=model,
            train=train,
            checkpoints=dict(files),
            record=folder / "recorded",
            grid=rs.EvenlySpaced(timesteps),
            queries={"generated": generate(training, model, weights, asked, folder / "generated.pt")},
            dim=how.dim,
            planted=scans.is_outlier,
        )

    @cached_property
    def subsets(self) -> tuple[Any, dict[str, Any]]:
        """Members `[m, n]` of half-size subsets, and the losses `[m, q]` of each kind of query."""
        how = self.setting
        members = evaluate.random_subsets(len(self.ids), how.subsets, seed=how.seed)
        queries = self.main.queries
        measure = Losses(joined(list(queries.values())), how.training)
        chosen = [self.ids[row] for row in members]
        losses = evaluate.retrain(
            chosen, self.trainer, measure, self.folder / "subsets", seed=how.seed, key=measure.key
        )
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
        for study in lab.studies
        for t, m, d in zip(*norm_curve(study.recorded), strict=True)
    ]


def recorded_specificity(lab: Lab) -> list[dict[str, Any]]:
    """(b) TracIn against ReTrac, recorded timesteps."""
    return [
        line
        for study in lab.studies
        for line in specificity(study, study.recorded_scores, mean_norms(study.recorded), lab.setting)
    ]


def averaged_specificity(lab: Lab) -> list[dict[str, Any]]:
    """(b) TracIn against ReTrac, averaged timesteps."""
    return [
        line
        for study in lab.studies
        for line in specificity(study, study.averaged_scores, mean_norms(study.averaged()[0]), lab.setting)
    ]


def specificity(study: Study, values: Any, length: Any, how: Setting) -> list[dict[str, Any]]:
    """For each kind of query and length of list, TracIn, ReTrac and their ratio."""
    return [
        line
        for kind in study.queries
        for k in how.lengths
        for line in compared(
            {"model": study.name, "queries": kind, "k": k},
            {name: values[name, kind] for name in TRACED},
            length,
            how.share,
        )
    ]


def compared(where: dict[str, Any], values: dict[str, Any], length: Any, share: float) -> list[dict[str, Any]]:
    """One line for TracIn, one for ReTrac, one for their ratio; `values` are scores `[q, n]`, `length` norms `[n]`."""
    lists = {name: top(found, where["k"]) for name, found in values.items()}
    lines = [
        where
        | {
            "estimator": name,
            "unique fraction": evaluate.jackknife(evaluate.unique_fraction, ids),
            "hubs": evaluate.bootstrap(lambda x: evaluate.hubs(x, share), ids),
            "largest share": evaluate.largest_share(ids),
            "norm correlation": evaluate.bootstrap(
                lambda x, y: evaluate.norm_correlation(x.T, y), values[name].T, length, draws=200
            ),
        }
        for name, ids in lists.items()
    ]
    ratio = {
        "estimator": "ReTrac / TracIn",
        "unique fraction": evaluate.jackknife(
            lambda a, b: evaluate.unique_fraction(b) / evaluate.unique_fraction(a), *lists.values()
        ),
        "hubs": evaluate.bootstrap(
            lambda a, b: evaluate.hubs(b, share) / max(1, evaluate.hubs(a, share)), *lists.values()
        ),
    }
    return [*lines, where | ratio]


def outliers(lab: Lab) -> list[dict[str, Any]]:
    """(c) Planted samples, found by self-influence."""
    lines = []
    for study in lab.studies:
        if study.planted is None:
            continue
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
        for name, values in measured.items():
            metrics = {m: over_both_kinds(m, values, study.planted) for m in ("auroc", "auprc", "recall")}
            lines.append({"model": study.name, "score": name} | metrics)
    return lines


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
    lines = []
    for study in lab.studies:
        stored = study.averaged()[0]
        own = np.arange(min(lab.setting.queries, len(study.train)))
        queries = study.sketch("traced", study.train.some(own, "traced"), like=stored)
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
    yield "TRAK", rs.TRAK(), "mse", True
    yield "TRAK, squared", rs.TRAK(squared=True), "mse", False
    yield "RelatIF", rs.RelatIF(), "mse", True
    yield "RenormIF", rs.RenormIF(), "mse", True
    for measure in rs.DTRAK.measures:
        yield f"D-TRAK, {measure.replace('_', ' ')}", rs.DTRAK(), measure, False
    yield "DAS", rs.DAS(), "mean_output", False


def by_other_queries(study: Study) -> Iterable[tuple[str, dict[str, Any]]]:
    """Label and scores by kind of query of estimators whose queries are not measured as the training side is."""
    (stored, _), task = study.averaged(last=True), study.task()
    samples = rs.Samples(study.train, task, study.last, study.grid)
    for label, divisors in (
        ("influence function, diagonal Fisher", rs.fisher_divisors(samples)),
        ("influence function, Fisher in eigenbases", rs.kronecker_divisors(samples)),
    ):
        asked = {
            kind: rs.sketch(
                task,
                images,
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
    drawn, bounded = replace(study.queries["generated"], word="journey"), study.training.bounded
    noise, random = beginning(len(drawn), study.model)
    sampler = study.training.scheduler()
    whole = rs.sample_journey(task, sampler, noise, SAMPLING_STEPS, conditioning=drawn.given, generator=random)
    if not torch.allclose(bounded(whole.samples), drawn.images, atol=1e-3):
        raise RuntimeError("the journey leads to other images than those that were generated.")
    some = slice(0, None, SAMPLING_STEPS // 10)
    clean = bounded(whole.images[:, some])
    journey = rs.Journey(clean, whole.timesteps[some], whole.samples, drawn.given, drawn.ids)
    queries = rs.sketch_journey(task, journey, checkpoints=study.last, like=stored)
    yield "Journey-TRAK, 10 steps", {"generated": scores(stored, rs.TRAK(), queries)}


def datamodels(lab: Lab) -> list[dict[str, Any]]:
    """(e) LDS of every estimator over half-size subsets."""
    members, losses = lab.subsets
    study = lab.main

    def line(label: str, checkpoints: str, values: dict[str, Any]) -> dict[str, Any]:
        return (
            {"estimator": label, "checkpoints": checkpoints}
            | {kind: evaluate.lds_mean(values[kind], members, losses[kind]) for kind in values}
            | {"unique fraction at 10": evaluate.jackknife(evaluate.unique_fraction, top(values["generated"], 10))}
        )

    lines = [
        line(f"{name}, recorded timesteps", "all", {kind: study.recorded_scores[name, kind] for kind in losses})
        for name in TRACED
    ]
    for label, estimator, measure, every in estimators():
        for checkpoints in ("last", "all")[: 1 + every]:
            stored, queries = study.averaged(measure, last=checkpoints == "last")
            lines.append(line(label, checkpoints, {k: scores(stored, estimator, queries[k]) for k in losses}))
    return lines + [line(label, "last", values) for label, values in by_other_queries(study)]


def dampings(lab: Lab) -> list[dict[str, Any]]:
    """(e) LDS of TRAK for 27 dampings and for the one that is chosen without labels; last checkpoint."""
    members, losses = lab.subsets
    stored, queries = lab.main.averaged(last=True)
    lines: list[dict[str, Any]] = []
    tried: list[Any] = ["auto", *DAMPINGS]
    for damping in tried:
        values = {kind: scores(stored, rs.TRAK(damping), queries[kind]) for kind in losses}
        lines.append(
            {"damping": damping}
            | {kind: float(np.nanmean(evaluate.lds(values[kind], members, losses[kind]))) for kind in losses}
        )
    best = {kind: max(line[kind] for line in lines[1:]) for kind in losses}
    return [*lines, {"damping": "auto / best of 27"} | {kind: lines[0][kind] / best[kind] for kind in losses}]


def removals(lab: Lab) -> list[dict[str, Any]]:
    """(f) The top samples of a generated query removed, the model trained again with the same seed."""
    how, study = lab.setting, lab.main
    values = {name: study.recorded_scores[name, "generated"] for name in TRACED}
    stored, queries = study.averaged(last=True)
    values["TRAK"] = scores(stored, rs.TRAK(), queries["generated"])
    lists = {name: top(found, how.removed)[: how.removal_queries] for name, found in values.items()}
    random = np.random.default_rng(how.seed).permutation(lab.ids)[: how.removed]
    lists["random, the same for all"] = np.tile(random, (how.removal_queries, 1))
    measure = Losses(study.queries["generated"].some(slice(how.removal_queries)), how.training)
    lines = []
    for name, ids in lists.items():
        change = evaluate.counterfactual(
            ids, lab.ids, lab.trainer, measure, lab.folder / "removals", seed=how.seed, key=measure.key
        )
        every = {f"query {number}": float(value) for number, value in enumerate(change)}
        lines.append({"removed": name} | every | {"mean": float(change.mean())})
    return lines


PARTS = {
    norms: "(a) Gradient norm against timestep, recorded pairs of all checkpoints",
    recorded_specificity: "(b) Specificity: TracIn against ReTrac, recorded timesteps",
    averaged_specificity: "(b) Specificity: TracIn against ReTrac, averaged timesteps",
    outliers: "(c) Planted outliers (of 16 x 16: 36 photograph patches among digits), found by self-influence",
    tracing: "(d) Training images as their own queries: the rank of the image itself",
    datamodels: "(e) LDS over half-size subsets, mean over queries",
    dampings: "(e) LDS of TRAK by damping, relative to the mean eigenvalue, last checkpoint",
    removals: "(f) Change of a query's loss after removing its top samples and training again",
}


def plain(value: Any) -> Any:
    """For JSON."""
    return asdict(value) if isinstance(value, Interval) else value


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="digits", choices=SETTINGS, help="what to run on")
    parser.add_argument("--folder", type=Path, help="of the data set, unless it is digits")
    parser.add_argument("--model", type=Path, help="of sd-lora: a Stable Diffusion in diffusers' layout")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {names}")
    parser.add_argument("--out", type=Path, help="for the tables and figures; benchmarks/results is that of digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[options.setting]
    if setting.data != "digits" and options.folder is None:
        parser.error(f"say where {setting.data} is: --folder PATH")
    work = HERE / ".cache" / ("paper" if options.setting == "digits" else f"paper-{options.setting}")
    out = options.out or (HERE / "results" if options.setting == "digits" else work)
    if isinstance(setting.training, LoRATraining):
        if options.model is None:
            parser.error("say where the Stable Diffusion is: --model PATH")
        setting = replace(setting, training=replace(setting.training, base=str(options.model)))
        data = captioned(options.folder, options.model, work)
    else:
        data = LOADERS[setting.data](options.folder)
    lab = Lab(setting, data, work)
    titles = {part.__name__: title for part, title in PARTS.items()}
    described = json.loads(json.dumps(asdict(setting)))
    file = out / "paper.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if report.get("setting") != described:
        report = {"results": {}, "dates": {}}
    report |= {
        "command": f"python -m benchmarks.paper --setting {options.setting}",
        "setting": described,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one torch thread; torch {torch.__version__}",
    }
    out.mkdir(parents=True, exist_ok=True)
    for part, title in PARTS.items():
        if part.__name__ not in options.only:
            continue
        print(title, flush=True)
        lines = json.loads(json.dumps(part(lab), default=plain))
        print(table(lines), flush=True)
        report["results"][part.__name__] = lines
        report["dates"][part.__name__] = datetime.datetime.now(datetime.UTC).date().isoformat()
        file.write_text(json.dumps(report, indent=1) + "\n")
        draw(report["results"], DAMPINGS, out)
        (out / "paper.md").write_text(page(report, titles))


if __name__ == "__main__":
    main()
