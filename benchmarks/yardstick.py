"""The yardstick: attribution methods, ours and others', and baselines, judged by the same ground truths.

    python -m benchmarks.yardstick --setting digits8
    python -m benchmarks.yardstick --setting emoji16 --folder FOLDER         # of the emoji tarballs
    python -m benchmarks.yardstick --setting digits8 --again "random"        # methods whose scores are computed anew
    python -m benchmarks.yardstick --setting digits8 --only "random"         # those alone; of others what is kept
    python -m benchmarks.yardstick --setting digits8 --kept                  # judges again, by truths that have grown
    python -m benchmarks.yardstick --page                                    # the pages alone, from the results

The model that is asked about is trained first (minutes) unless it is there. Scores are kept, by method and kind of
query, in WORK/SETTING/yardstick: when a truth has grown, everything is judged again in seconds. Figures go to
benchmarks/results/yardstick-SETTING.json and .md, the comparison of settings to docs/leaderboard.md and the README.

No damping is tuned on what it is judged by: it follows from a rule without labels, or it is fitted to every second
subset and judged by the others, which the row says.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import yardstick_page as pages
from benchmarks.measurement_page import cpu_name
from benchmarks.yardstick_baselines import baselines, sanity
from benchmarks.yardstick_foreign import foreign
from benchmarks.yardstick_lab import Lab, Scores, digest
from benchmarks.yardstick_methods import DAMPINGS, FORMS, RECIPE, SIGNED, Method, ours
from retrac_scale import evaluate
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate.datamodeling import sums_and_outcomes
from retrac_scale.evaluate.intervals import two_way
from retrac_scale.evaluate.settings import SETTINGS
from retrac_scale.evaluate.spearman import Columns, correlation, pseudo_values

HERE = Path(__file__).parent
DRAWS = 300
FITTED, JUDGING = slice(0, None, 2), slice(1, None, 2)
"""Subsets that a damping is fitted to, and those that then judge."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: whose scores.
        form: what was made of them, of `FORMS`.
        scores: {kind of query: `[q, n]`}.
        half: whether a damping was fitted to every second subset, so that the others alone judge.
    """

    method: Method
    form: str
    scores: Scores
    half: bool = False


def lab_of(setting: evaluate.Setting, truths: list[evaluate.Truth]) -> Lab:
    """A setting with the queries of its truths; the folder's name tells data and weights."""
    kinds = dict.fromkeys(kind for truth in truths for kind in truth.kinds)
    made = hashlib.blake2b(digest(setting.train).encode(), digest_size=6)
    for weights in setting.checkpoints.values():
        for name, values in sorted(weights.items()):
            made.update(name.encode() + values.numpy().tobytes())
    return Lab(
        setting.train,
        {kind: setting.queries[kind] for kind in kinds},
        setting.build,
        setting.scheduler,
        setting.checkpoints,
        setting.record,
        setting.work / "yardstick" / made.hexdigest(),
        setting.trainer,
    )


def asked(method: Method, lab: Lab, again: bool = False, kept: bool = False) -> tuple[Scores, dict[str, Any]]:
    """A method's scores, computed for the kinds of queries that are not there yet, and what they cost at first.

    With `kept` nothing is computed, and what is not there is left out.
    """
    place = lab.folder / "scores" / re.sub(r"[^a-z0-9]+", "-", f"{method.name} {method.noise}".lower()).strip("-")
    files = {kind: place / f"{kind}-{digest(images)}.npy" for kind, images in lab.queries.items()}
    missing = [kind for kind, file in files.items() if again or not (kept or file.exists())]
    told = place / "cost.json"
    if missing:
        found = method.ask(lab.some(missing))
        place.mkdir(parents=True, exist_ok=True)
        for kind in missing:  # a kind that the method has no scores for is an empty file
            np.save(files[kind], np.asarray(found.scores.get(kind, []), np.float32))
        if again or not told.exists():
            cost = {"pairs": found.pairs, "bytes": found.bytes, "seconds": found.seconds, "machine": machine()}
            told.write_text(json.dumps(cost))
    if not told.exists():
        return {}, {}
    scores = {kind: np.load(file).astype(np.float64) for kind, file in files.items() if file.exists()}
    return {kind: values for kind, values in scores.items() if values.size}, json.loads(told.read_text())


def machine() -> str:
    """What the seconds are of."""
    return f"{cpu_name()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"


def rows_of(method: Method, scores: Scores, truths: list[evaluate.Truth]) -> Iterator[Row]:
    """A method's scores in each of its forms, at a damping by rule and at a fitted one."""
    for form in method.forms:
        told = {kind: FORMS[form](values) for kind, values in scores.items()}
        if not method.fits:
            yield Row(method, form, told)
            continue
        if method.rule:
            yield Row(method, form, {kind: values[DAMPINGS.index(AUTO)] for kind, values in told.items()})
        known = next((truth for truth in truths if isinstance(truth, evaluate.Subsets)), None)
        if known is not None:
            name = method.name if method.name.endswith("fitted") else f"{method.name}, damping fitted"
            yield Row(replace(method, name=name), form, at_fitted(told, known), half=True)


def at_fitted(scores: Scores, truth: evaluate.Subsets) -> Scores:
    """Of `[d, q, n]` that whose damping has the largest mean LDS over every second subset, by kind of query."""
    fitted = {}
    for kind in truth.kinds.keys() & scores.keys():
        seen = with_subsets(truth.some([kind]), FITTED)
        found = [np.nan_to_num(evaluate.lds(one, seen.members, seen.losses)).mean() for one in scores[kind]]
        fitted[kind] = scores[kind][int(np.argmax(found))]
    return fitted


def with_subsets(truth: evaluate.Subsets, chosen: slice) -> evaluate.Subsets:
    """A truth of some of its subsets."""
    return replace(truth, members=truth.members[chosen], losses=truth.losses[chosen], again=truth.again[:, chosen])


def judged(row: Row, truth: evaluate.Truth) -> list[dict[str, Any]]:
    """Each metric of a truth on each kind of query that the row has scores for; of half the subsets, the LDS alone.

    Signed squares change sums of scores alone, so they are not judged by lists.
    """
    kinds = [kind for kind in truth.kinds if kind in row.scores]
    same = row.form == SIGNED and isinstance(truth, evaluate.Wanted)
    if not kinds or same or (row.half and not isinstance(truth, evaluate.Subsets)):
        return []
    truth = truth.some(kinds)
    if row.half and isinstance(truth, evaluate.Subsets):
        truth = with_subsets(truth, JUDGING)
    return [asdict(figure) for figure in evaluate.judge(row.scores, truth, draws=DRAWS).figures]


def ahead(leader: Scores, other: Scores, truth: evaluate.Subsets) -> dict[str, Any]:
    """By how much the leader's LDS is larger, by kind of query, with the interval of the difference.

    Their models and queries are the same, so that a difference can be clear where the two intervals overlap.
    """
    found = {}
    for kind, rows in truth.rows.items():
        if kind in other:
            losses = truth.losses[:, rows]
            both = [map(Columns.of, sums_and_outcomes(one[kind], truth.members, losses)) for one in (leader, other)]
            values, tables = zip(*((correlation(a, b), pseudo_values(a, b)) for a, b in both), strict=True)
            value, table = (np.nan_to_num(one) - np.nan_to_num(two) for one, two in (values, tables))
            found[kind] = asdict(two_way(value.mean(), table))
    return found


def every_method() -> tuple[Method, ...]:
    """All that there are."""
    return (*ours(), *foreign(), *baselines(), *sanity())


def when(method: Method) -> tuple[bool, int]:
    """What is computed first: a run that is stopped leaves a table of what it has."""
    return method.late, {"common": 0, "-": 0, "by place in the batch": 1}.get(method.noise, 2)


def table(lab: Lab, truths: list[evaluate.Truth], again: list[str], only: list[str] | None) -> Iterator[dict[str, Any]]:
    """A line for each row; with `only`, scores of other methods are taken where they are, and not computed."""
    leaders: dict[tuple[bool, bool], Scores] = {}
    known = next((truth for truth in truths if isinstance(truth, evaluate.Subsets)), None)
    for method in sorted(every_method(), key=when):
        kept = only is not None and method.name not in only
        scores, cost = asked(method, lab, method.name in again, kept)
        for row in rows_of(method, scores, truths) if scores else ():
            line: dict[str, Any] = {"method": row.method.name, "noise": method.noise, "group": method.group}
            line |= {"form": row.form, **cost, "half": row.half}
            line["figures"] = {truth.name: judged(row, truth) for truth in truths}
            among = (bool(row.form), row.half)
            if among not in leaders:  # the recipe is the first of ours
                leaders[among] = row.scores
            elif known is not None:
                seen = with_subsets(known, JUDGING) if row.half else known
                line["ahead"] = ahead(leaders[among], row.scores, seen)
            yield line


def run(setting: evaluate.Setting, names: list[str], again: list[str], only: list[str] | None, file: Path) -> None:
    """Write the report of a setting, judged by some truths, row by row; rows of an earlier run stay until then.

    With `only` those without scores stay afterwards too, unless a truth that they were judged by has changed.
    """
    truths = [evaluate.truth(name) for name in names]
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.yardstick --setting {setting.name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "setting": setting.name,
        "samples": len(setting.train),
        "recipe": RECIPE,
        "truths": {truth.name: truth.sentence for truth in truths},
        "rows": [],
    }
    old = json.loads(file.read_text()) if file.exists() else report
    same = all(old["truths"].get(name, said) == said for name, said in report["truths"].items())
    before = old["rows"] if same else []
    machines = {key(row): row["machine"] for row in old["rows"]}
    done: list[dict[str, Any]] = []
    for line in table(lab_of(setting, truths), truths, again, only):
        done.append({"machine": machines.get(key(line), machine())} | line)
        report["rows"] = done + [row for row in before if not any(key(row) == key(one) for one in done)]
        file.write_text(json.dumps(report, indent=1) + "\n")
        shown = [f"{f['queries']} {f['metric']} {f['value']['value']:.3f}" for x in line["figures"].values() for f in x]
        print(line["method"], line["noise"], line["form"], *shown, sep=" | ", flush=True)
    file.write_text(json.dumps(report if only is not None else report | {"rows": done}, indent=1) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row of the table from others."""
    return tuple(row[name] for name in ("method", "noise", "form", "half"))


def write_pages() -> None:
    """Those of each setting, the leaderboard and the README's comparison, from the results."""
    results = HERE / "results"
    reports, removals = (
        [json.loads(file.read_text()) for file in sorted(results.glob(f"{what}-*.json"))]
        for what in ("yardstick", "removal")
    )
    for report in reports:
        (results / f"yardstick-{report['setting']}.md").write_text(pages.setting_page(report))
    docs, readme = HERE.parent / "docs" / "leaderboard.md", HERE.parent / "README.md"
    docs.write_text(pages.leaderboard(reports, removals))
    readme.write_text(pages.with_comparison(readme.read_text(), reports))


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models and scores")
    parser.add_argument("--truths", nargs="+", metavar="TRUTH", help="to judge by (default: all of the setting)")
    parser.add_argument("--again", nargs="+", default=[], metavar="METHOD", help="whose scores are computed anew")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="compute these alone, and judge what else is there")
    parser.add_argument("--kept", action="store_true", help="judge the scores that are there, compute none")
    parser.add_argument("--page", action="store_true", help="write the pages from the results")
    options = parser.parse_args()
    if not options.page and options.setting is None:
        parser.error("say which --setting, or --page")
    if unknown := {*(options.only or ()), *options.again} - {one.name for one in every_method()}:
        parser.error(f"there is no method {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    results = HERE / "results"
    if options.setting is not None:
        setting = evaluate.setting(options.setting, folder=options.folder, work=options.work)
        known = [name for name in evaluate.truths() if name.split("-")[0] == setting.name]
        only = [] if options.kept else options.only
        run(setting, options.truths or known, options.again, only, results / f"yardstick-{setting.name}.json")
    write_pages()


if __name__ == "__main__":
    main()
