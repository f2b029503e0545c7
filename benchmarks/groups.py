"""Do the shares of groups tell whose removal hurts a query most?

    python -m benchmarks.groups                                        # of digits8
    python -m benchmarks.groups --setting emoji16 --folder FOLDER      # of the emoji tarballs

asks by `index.query(..., group_by=...)` about every query of SETTING-groups, a truth from models that were trained
without one group each. "First": how often the group with the largest share is the one whose removal raises the query's
loss most, and the same of groups in the order of their scores; "within": how often the share of that group lies within
the 95 % interval of the largest share, or is the largest, and how many groups do; "apart": the part of all pairs of
groups whose shares are more than two standard errors of the difference apart, and how many of these stand in the order
of the losses. Tables go to benchmarks/results/groups-SETTING.md.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.paper_page import table
from benchmarks.yardstick import lab_of
from benchmarks.yardstick_lab import Lab
from benchmarks.yardstick_methods import measurements
from retrac_scale import evaluate
from retrac_scale.estimators import Estimator
from retrac_scale.evaluate.judging import ranking
from retrac_scale.evaluate.settings import SETTINGS

HERE = Path(__file__).parent
REACH, DEPTH = 1.96, 3
"""Standard errors of a 95 % interval; groups of NDCG."""
ESTIMATORS: dict[str, tuple[str, Estimator]] = {
    "ReTracRidge (common)": ("common 4 x 512", rs.ReTracRidge()),
    "ReTrac, matched (common)": ("common 4 x 512", rs.ReTrac("matched")),
    "TRAK (own)": ("own 10 x 4096", rs.TRAK()),
}
"""By name: how samples are measured, and the estimator."""


def compared(shares: Any, errors: Any, scores: Any, harm: Any) -> dict[str, Any]:
    """Of shares, their errors, scores and the rise of the loss without each group, `[q, g]` each: figures `[q]`."""
    rows, worst = np.arange(len(harm)), harm.argmax(1)
    best = shares.argmax(1)
    low = shares[rows, best] - REACH * errors[rows, best]
    within = shares >= low[:, None]
    above = np.triu_indices(harm.shape[1], 1)
    gap, rise = ((x[:, :, None] - x[:, None])[:, *above] for x in (shares, harm))
    reach = REACH * np.hypot(errors[:, :, None], errors[:, None])[:, *above]
    apart = np.abs(gap) > reach
    right = apart & (np.sign(gap) == np.sign(rise))
    with np.errstate(invalid="ignore"):
        return {
            "first, by share": 1.0 * (best == worst),
            "first, by score": 1.0 * (scores.argmax(1) == worst),
            f"NDCG@{DEPTH}, by share": ranking.ndcg(ranking.ranked(shares, harm), DEPTH),
            "within": 1.0 * within[rows, worst],
            "groups within": 1.0 * within.sum(1),
            "apart": apart.mean(1),
            "of these in order": right.sum(1) / apart.sum(1),
        }


def by_name(answer: rs.TopK, names: Any) -> tuple[Any, Any, Any]:
    """Shares, their errors and scores of the groups in the order of their names, `[q, g]` each."""
    places = np.argsort(answer.ids, axis=1)
    assert answer.shares is not None
    assert answer.share_errors is not None
    assert (np.take_along_axis(answer.ids, places, 1) == np.sort(names)).all()
    back = np.argsort(np.argsort(names))
    found = (answer.shares, answer.share_errors, answer.scores)
    shares, errors, scores = (np.take_along_axis(x, places, 1)[:, back] for x in found)
    return shares, errors, scores


def lines(lab: Lab, truth: evaluate.Groups) -> Iterator[dict[str, Any]]:
    """A line of each estimator, way to group, and kind of query."""
    for name, (measurement, estimator) in ESTIMATORS.items():
        store, queries, _ = lab.sketched(measurement, measurements()[measurement])
        index = rs.build_index(store, estimator, None)
        for column, labels in truth.labels.items():
            names, harm = np.asarray(truth.names[column]), truth.harm(column).mean(0)
            for kind, rows in truth.rows.items():
                answer = index.query(queries[kind], len(names), group_by=labels)
                figures = compared(*by_name(answer, names), harm[rows])
                known = {what: x[np.isfinite(x)] for what, x in figures.items()}
                told = {what: asdict(evaluate.bootstrap(np.mean, x)) if len(x) else "-" for what, x in known.items()}
                yield {"estimator": name, "groups": f"{len(names)}, {column}", "queries": kind, **told}


def ceilings(truth: evaluate.Groups) -> Iterator[dict[str, Any]]:
    """What the rise of the loss under one seed says of that under another, of each way to group and kind of query."""
    judged = evaluate.judge(np.zeros(truth.shape), truth)
    for column, names in truth.names.items():
        for kind in truth.kinds:
            top = {
                what: judged[f"{metric} of {len(names)}, {column}", kind].ceiling
                for what, metric in (("first, by share", "first"), (f"NDCG@{DEPTH}, by share", f"NDCG@{DEPTH}"))
            }
            told = {what: asdict(one) for what, one in top.items() if one is not None}
            yield {"estimator": "*one seed by another*", "groups": f"{len(names)}, {column}", "queries": kind, **told}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="digits8")
    parser.add_argument("--folder", type=Path, help="of the emoji tarballs")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models and sketches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth = evaluate.truth(f"{arguments.setting}-groups")
    assert isinstance(truth, evaluate.Groups)
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    lab = lab_of(setting, [truth])
    found = table([*lines(lab, truth), *ceilings(truth)])
    print(found)
    about = [
        f"`python -m benchmarks.groups --setting {setting.name}`, {datetime.date.today()}, {cpu_name()}; torch",
        f"{torch.__version__}. Written by that command.\n",
        f"{truth.name}: {truth.sentence}. Brackets: 95 % intervals over queries. What the columns say stands in",
        "benchmarks/groups.py.\n",
    ]
    text = "\n".join([f"# Shares of groups: {setting.name}\n", *about, found, ""])
    (HERE / "results" / f"groups-{setting.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
