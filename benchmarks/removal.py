"""Does a generated image change when the samples that a method names are left out?

    python -m benchmarks.removal --setting digits8
    python -m benchmarks.removal --setting digits8 --method "my method" --scores scores.npy

trains again without each query's top tenth, and without random tenths, for three methods of the yardstick, or for
scores `[queries, samples]` as `retrac-scale judge` takes them for SETTING-lds. Figures go to
benchmarks/results/removal-SETTING.json and to docs/leaderboard.md. Stopped, it goes on where it was; more --queries add
to what is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measurement_page import cpu_name
from benchmarks.truths import hours
from benchmarks.yardstick import asked, lab_of, write_pages
from benchmarks.yardstick_baselines import baselines
from benchmarks.yardstick_methods import LOSS, ours
from retrac_scale import evaluate
from retrac_scale.evaluate.settings import SETTINGS, Setting
from retrac_scale.evaluate.settings.removal import Removal, removal

HERE = Path(__file__).parent
METHODS = ((LOSS, "common"), ("TRAK", "own"), ("pixel ridge", "-"))
SHARE, RANDOM = 0.1, 4
"""How much is removed, and how many models are trained without random samples."""


def known(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Name and scores `[64, n]` of each of `METHODS`, which the yardstick keeps."""
    lab = lab_of(setting, [evaluate.truth(f"{setting.name}-lds")])
    for method in (*ours(), *baselines()):
        if (method.name, method.noise) in METHODS:
            scores, _ = asked(method, lab.some(["generated"]))
            yield method.name + f" ({method.noise})" * (method.noise != "-"), scores["generated"]


def given(file: Path, truth: evaluate.Truth) -> Any:
    """Scores of the generated queries in a file of all."""
    scores = np.load(file)
    if scores.shape != truth.shape:
        raise SystemExit(f"{file} holds {scores.shape}, expected {truth.shape}.")
    return scores[truth.rows["generated"]]


def line(found: Removal) -> dict[str, Any]:
    """What is told of a method, intervals over queries."""
    told: dict[str, Any] = {"queries": len(found.loss)}
    for what in ("loss", "image"):
        own, at_random = getattr(found, what), getattr(found, f"{what}_at_random")
        told |= {what: asdict(evaluate.bootstrap(np.mean, own))}
        told |= {f"{what} at random": asdict(evaluate.bootstrap(np.mean, at_random))}
        told |= {f"{what}, beyond {other}": asdict(found.beyond(what, other)) for other in ("random", "others")}
    return told


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits8")
    parser.add_argument("--method", help="name of the line of --scores")
    parser.add_argument("--scores", type=Path, help=".npy of a method's scores for SETTING-lds")
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--queries", type=int, default=8, help="generated images that are asked about (default: 8)")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models")
    arguments = parser.parse_args()
    if (arguments.method is None) != (arguments.scores is None):
        parser.error("give --method and --scores together, or neither")
    torch.set_num_threads(1)
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    file = HERE / "results" / f"removal-{setting.name}.json"
    lines = json.loads(file.read_text())["lines"] if file.exists() else {}
    if arguments.scores is None:
        methods = known(setting)
    else:
        methods = iter([(arguments.method, given(arguments.scores, evaluate.truth(f"{setting.name}-lds")))])
    for name, scores in methods:
        found = removal(setting, scores, queries=arguments.queries, share=SHARE, random=RANDOM)
        lines[name] = line(found)
        report = {
            "command": f"python -m benchmarks.removal --setting {setting.name} --queries {arguments.queries}",
            "machine": f"{cpu_name()}, one thread; torch {torch.__version__}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "setting": setting.name,
            "removed": round(SHARE * len(setting.ids)),
            "samples": len(setting.ids),
            "random": RANDOM,
            "hours": hours(setting.work / "removal"),
            "lines": lines,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(
            name,
            *(
                f"{what} {x['value']:.4f} [{x['low']:.4f}, {x['high']:.4f}]"
                for what, x in lines[name].items()
                if what != "queries"
            ),
            sep=" | ",
            flush=True,
        )
    write_pages()


if __name__ == "__main__":
    main()
