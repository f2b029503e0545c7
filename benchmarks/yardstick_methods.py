"""The methods of this package on the yardstick: every estimator, influence functions, Journey-TRAK."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import retrac_scale as rs
from benchmarks.yardstick_lab import Lab, Measurement, Scores, damped, scored
from retrac_scale.estimators import Estimator
from retrac_scale.evaluate.settings.generating import SAMPLING_STEPS, beginning

LOSS = "ReTracRidge"
RECIPE = f"{LOSS}, loss and output"
"""What `init` recommends; without "loss and output" a row is of the loss alone."""
AS_THEY_ARE, SIGNED, SQUARED = "", "signed squares", "squared"
FORMS: dict[str, Callable[[Any], Any]] = {
    AS_THEY_ARE: lambda scores: scores,
    SIGNED: lambda scores: scores * np.abs(scores),
    SQUARED: np.square,
}
"""What is made of scores before they are judged."""
BOTH, OF_DAS, EVERY = (AS_THEY_ARE, SIGNED), (AS_THEY_ARE, SQUARED), (AS_THEY_ARE, SIGNED, SQUARED)
DAMPINGS = [factor * 10.0**power for power in range(-6, 3) for factor in (1, 2, 5)]
"""27 values from a millionth to 500, relative to the mean eigenvalue: as many as D-TRAK's and DAS's scripts try."""


@dataclass(frozen=True)
class Found:
    """Scores, and what they cost.

    Attributes:
        scores: {kind of query: `[q, n]`}, or `[d, q, n]` for each of `DAMPINGS`.
        pairs: (timestep, noise) pairs of a training sample that were differentiated, or passed through the model.
        bytes: of a training sample that a store keeps.
        seconds: CPU time from images and weights to the scores of all queries.
    """

    scores: Scores
    pairs: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in the table.
        noise: which noise it sees: "common", "own", "recorded", "by place in the batch" or "-".
        ask: gives its scores.
        group: "ours", "published", "baseline" or "sanity".
        forms: which rows there are, of `FORMS`.
        fits: whether its scores are those of all `DAMPINGS`, of which one is fitted to half of the subsets.
        rule: whether there are rows at the damping by rule too.
        late: whether it is computed after all that take less.
    """

    name: str
    noise: str
    ask: Callable[[Lab], Found]
    group: str = "ours"
    forms: tuple[str, ...] = (AS_THEY_ARE,)
    fits: bool = False
    rule: bool = True
    late: bool = False


def measurements() -> dict[str, Measurement]:
    """All that is sketched, by name."""
    own, wide = rs.EvenlySpaced(10, noise="own"), rs.CountSketch(4096)
    return {
        "common 4 x 512": Measurement(rs.EvenlySpaced(4)),
        "common 4 x 512, mean squared output": Measurement(rs.EvenlySpaced(4), measure="mean_squared_output"),
        "common 4 x 512, mean output": Measurement(rs.EvenlySpaced(4), measure="mean_output"),
        "common 4 x 256": Measurement(rs.EvenlySpaced(4), rs.LowRank(dim=256)),
        "common 4 x 256, mean squared output": Measurement(
            rs.EvenlySpaced(4), rs.LowRank(dim=256), measure="mean_squared_output"
        ),
        "common 8 x 512": Measurement(rs.EvenlySpaced(8)),
        "common 4 x 4096": Measurement(rs.EvenlySpaced(4), wide),
        "own 10 x 4096": Measurement(own, wide),
        "own 10 x 4096, mean squared output": Measurement(own, wide, measure="mean_squared_output"),
        "own 10 x 4096, mean output": Measurement(own, wide, measure="mean_output"),
        "recorded 4 x 4096": Measurement(None, wide, every=True, queries=rs.EvenlySpaced(20, noise="own")),
    }


def estimated(measurement: str, estimator: Estimator, lab: Lab) -> Found:
    """What an estimator makes of a store."""
    store, queries, seconds = lab.sketched(measurement, measurements()[measurement])
    started = time.process_time()
    scores = scored(store, queries, estimator, "int8")
    _, t, k = store.shape
    stored = len(store.checkpoints) * t
    return Found(scores, stored, stored * k, seconds + time.process_time() - started)


def summed(measurement: str, lab: Lab) -> Found:
    """Of the loss and of the mean squared output, as `open_store(measure=[...])` has them side by side."""
    found = [estimated(f"{measurement}{also}", rs.ReTracRidge(), lab) for also in ("", ", mean squared output")]
    scores = {kind: sum(one.scores[kind] for one in found) for kind in lab.queries}
    pairs, stored, seconds = (sum(getattr(one, name) for one in found) for name in ("pairs", "bytes", "seconds"))
    return Found(scores, pairs, stored, seconds)


def ours() -> list[Method]:
    """Every estimator on common, own and recorded noise."""

    def row(
        name: str, noise: str, measurement: str, estimator: Estimator, forms: tuple[str, ...] = (AS_THEY_ARE,)
    ) -> Method:
        return Method(name, noise, partial(estimated, measurement, estimator), forms=forms)

    common, own, recorded = "common 4 x 512", "own 10 x 4096", "recorded 4 x 4096"
    return [
        Method(RECIPE, "common", partial(summed, common), forms=BOTH),
        Method(f"{RECIPE}, 256 entries each", "common", partial(summed, "common 4 x 256"), forms=BOTH),
        row(LOSS, "common", common, rs.ReTracRidge(), forms=BOTH),
        row("TRAK, matched", "common", common, rs.TRAK(pairing="matched"), forms=BOTH),
        row("TRAK", "common", common, rs.TRAK(), forms=BOTH),
        row("TRAK of directions", "common", common, rs.TRAK(directions=True), forms=BOTH),
        row("RelatIF, matched", "common", common, rs.RelatIF(pairing="matched"), forms=BOTH),
        row("RenormIF, matched", "common", common, rs.RenormIF(pairing="matched"), forms=BOTH),
        row("ReTrac, matched", "common", common, rs.ReTrac("matched")),
        row("TracIn, matched", "common", common, rs.TracIn("matched")),
        row("GradCos", "common", common, rs.GradCos()),
        row("DTRAK, matched", "common", f"{common}, mean squared output", rs.DTRAK(pairing="matched"), forms=BOTH),
        row(f"{LOSS}, eight timesteps", "common", "common 8 x 512", rs.ReTracRidge(), forms=BOTH),
        row("DAS, matched", "common", f"{common}, mean output", rs.DAS(pairing="matched"), forms=OF_DAS),
        row(LOSS, "own", own, rs.ReTracRidge(), forms=BOTH),
        row("TRAK", "own", own, rs.TRAK(), forms=BOTH),
        row("RelatIF", "own", own, rs.RelatIF(), forms=BOTH),
        row("RenormIF", "own", own, rs.RenormIF(), forms=BOTH),
        row("ReTrac", "own", own, rs.ReTrac()),
        row("TracIn", "own", own, rs.TracIn()),
        row("GradCos", "own", own, rs.GradCos()),
        row("DTRAK", "own", f"{own}, mean squared output", rs.DTRAK(), forms=BOTH),
        row("DAS", "own", f"{own}, mean output", rs.DAS(), forms=OF_DAS),
        row("TracIn", "recorded", recorded, rs.TracIn()),
        row("ReTrac", "recorded", recorded, rs.ReTrac()),
        row("TRAK", "recorded", recorded, rs.TRAK(), forms=BOTH),
        *(
            Method(f"influence function, {name}", noise, partial(influence, measurement, pairing, divisors), late=True)
            for noise, measurement, pairing in (("common", "common 4 x 4096", "matched"), ("own", own, "cross"))
            for name, divisors in (("diagonal Fisher", rs.fisher_divisors), ("EK-FAC", rs.kronecker_divisors))
        ),
        Method("Journey-TRAK, 10 steps", "own", journey_trak, forms=BOTH, late=True),
        *(
            Method(
                f"{name}, damping fitted",
                "common",
                partial(fitted, measurement, unit, errors),
                "ours",
                BOTH,
                True,
                False,
            )
            for name, measurement, unit, errors in (
                (LOSS, common, True, False),
                ("TRAK, matched", common, False, False),
                ("DTRAK, matched", f"{common}, mean squared output", False, False),
                ("DAS, all directions, matched", f"{common}, mean output", True, True),
            )
        ),
    ]


def fitted(measurement: str, unit: bool, errors: bool, lab: Lab) -> Found:
    """sum_t of `damped` gradients, or of their directions, at the same timestep; each sample's times its own error."""
    store, queries, seconds = lab.sketched(measurement, measurements()[measurement])
    started, name = time.process_time(), store.checkpoints[0]
    estimator: Estimator = rs.ReTrac() if unit else rs.TracIn()
    train = estimator.stored_vectors(store, name).astype(np.float64)
    roots = np.sqrt(store.losses(name).astype(np.float64)) if errors else np.ones(train.shape[:2])
    asked = {kind: estimator.stored_vectors(one, name).astype(np.float64) for kind, one in queries.items()}
    _, t, k = store.shape
    scores = {
        kind: sum(damped(train[:, at], x[:, at], DAMPINGS, roots[:, at]) for at in range(t))
        for kind, x in asked.items()
    }
    return Found(scores, t, t * k, seconds + time.process_time() - started)


def influence(measurement: str, pairing: Any, divisors: Callable[[rs.Samples], Any], lab: Lab) -> Found:
    """<S H^-1 g_q, S g_i>: queries divided by a curvature of the training loss (Mlodozeniec et al. 2024)."""
    how = measurements()[measurement]
    store, _, seconds = replace(lab, queries={}).sketched(measurement, how)
    started = time.process_time()
    divided = divisors(rs.Samples(lab.train, lab.task(), lab.last, how.plan))
    queries = {
        kind: rs.sketch(
            lab.task(),
            images,
            None,
            checkpoints=lab.last,
            timesteps=how.plan,
            batch_size=64,
            like=store,
            precondition=divided,
            progress=False,
        )
        for kind, images in lab.queries.items()
    }
    scores = scored(store, queries, rs.TracIn(pairing), "int8")
    _, t, k = store.shape
    return Found(scores, t, t * k, seconds + time.process_time() - started)


def journey_trak(lab: Lab) -> Found:
    """TRAK of generated images along their sampling trajectory (Georgiev et al. 2023, Zheng et al. 2024)."""
    measurement = "own 10 x 4096"
    store, _, seconds = replace(lab, queries={}).sketched(measurement, measurements()[measurement])
    started = time.process_time()
    scores: Mapping[str, Any] = {}
    if "generated" in lab.queries and hasattr(lab.scheduler, "scale_model_input"):  # a flow's samplers tell no journey
        task, drawn = lab.task(), replace(lab.queries["generated"], word="journey")
        task.load("last", next(iter(lab.last.values())))
        noise, random = beginning(len(drawn), task.model)
        whole = rs.sample_journey(
            task, lab.scheduler, noise, SAMPLING_STEPS, conditioning=drawn.given, generator=random
        )
        off = float((whole.samples.clamp(-1, 1) - drawn.images).abs().mean())
        if off > 0.01:
            raise RuntimeError(f"the journey leads to other images than those that were generated, {off:.2g} away.")
        some = slice(0, None, SAMPLING_STEPS // 10)
        clean = whole.images[:, some].clamp(-1, 1)
        journey = rs.Journey(clean, whole.timesteps[some], whole.samples, drawn.given, drawn.ids)
        queries = rs.sketch_journey(task, journey, checkpoints=lab.last, like=store)
        scores = scored(store, {"generated": queries}, rs.TRAK(), "int8")
    _, t, k = store.shape
    return Found(dict(scores), t, t * k, seconds + time.process_time() - started)
