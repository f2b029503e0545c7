"""Do neighbours that an answer calls resolved stand in that order, and do errors cover what other timesteps say?

    python -m benchmarks.resolved --setting digits8
    python -m benchmarks.resolved --setting emoji16 --folder FOLDER    # of the emoji tarballs

sketches a setting at 32 timesteps under common noise, asks about its held-out and generated pictures with 2, 4 and 8
of them at a time, and takes the mean over those that are left for the truth. "Wrong": of the neighbours in the top ten
that are resolved, how many stand in the other order; beside it, of all neighbours. "Covered": how often a score plus
and minus 1.96 of its errors holds what the timesteps that are left say, over all samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.paper_page import table
from benchmarks.yardstick import lab_of
from benchmarks.yardstick_lab import Measurement
from retrac_scale import evaluate
from retrac_scale.evaluate.settings import SETTINGS

HERE = Path(__file__).parent
ALL, K = 32, 10


def at(store: rs.SketchStore, steps: Any) -> rs.SketchStore:
    """Some of a store's timesteps, as a store of their own."""
    (name,) = store.checkpoints
    taken = {name: store.sketches(name)[:, steps]}
    told = {"norms": {name: store.norms(name)[:, steps]}, "timesteps": store.timesteps(name, [0])[0, steps]}
    return rs.write_store(None, taken, dtype="float32", **told)


def judged(store: rs.SketchStore, queries: rs.SketchStore, count: int) -> dict[str, Any]:
    """What answers of so many evenly spaced timesteps say, against those that are left; the mean over such choices."""
    stride, found = ALL // count, []
    for first in range(1, stride, 2):
        some = np.arange(first, ALL, stride)
        index, asked = rs.build_index(at(store, some), rs.ReTracRidge(), dtype="float32"), at(queries, some)
        left = np.setdiff1d(np.arange(ALL), some)
        rest = rs.build_index(at(store, left), rs.ReTracRidge(), dtype="float32")
        truth = np.asarray(rest.scores(at(queries, left))) * count / len(left)
        answer = index.query(asked, len(truth[0]))
        assert answer.errors is not None
        sorted_truth = np.take_along_axis(truth, answer.ids, 1)
        covered = np.abs(answer.scores - sorted_truth) < 1.96 * answer.errors
        top = index.query(asked, K + 1)
        assert top.resolved is not None
        resolved, wrong = top.resolved[:, :K], np.diff(np.take_along_axis(truth, top.ids, 1)) > 0
        found.append([resolved.mean(), (wrong & resolved).sum() / max(1, resolved.sum()), wrong.mean(), covered.mean()])
    names = ("resolved", "of these wrong", "of all neighbours wrong", "covered")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits8")
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models and sketches")
    options = parser.parse_args()
    setting = evaluate.setting(options.setting, folder=options.folder, work=options.work)
    lab = lab_of(setting, [evaluate.truth(f"{setting.name}-lds")]).some(["held out", "generated"])
    store, queries, _ = lab.sketched("common 32 x 512", Measurement(rs.EvenlySpaced(ALL)))
    lines = [
        {"queries": kind, "timesteps": count, **judged(store, one, count)}
        for kind, one in queries.items()
        for count in (2, 4, 8)
    ]
    page = (
        f"# Resolved neighbours and errors: {setting.name}\n\n`python -m benchmarks.resolved --setting {setting.name}`"
    )
    page += f", {cpu_name()}. Written by that command; what the columns say stands in benchmarks/resolved.py.\n\n"
    (HERE / "results" / f"resolved-{setting.name}.md").write_text(page + table(lines) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
