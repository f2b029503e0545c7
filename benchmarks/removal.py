"""Does a generated image change when the samples that a method names are left out?

    python -m benchmarks.removal --setting digits8 --method "pixel ridge" --scores scores.npy

trains again without each query's top tenth, and without random tenths, and adds a line to
benchmarks/results/removal-SETTING.json. Scores are `[queries, samples]` as `retrac-scale judge` takes them for
SETTING-lds. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from retrac_scale import evaluate
from retrac_scale.evaluate.settings import SETTINGS
from retrac_scale.evaluate.settings.removal import removal

HERE = Path(__file__).parent


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--method", required=True, help="name of the line")
    parser.add_argument("--scores", type=Path, required=True, help=".npy of the method's scores for SETTING-lds")
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--queries", type=int, default=8, help="generated images that are asked about (default: 8)")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "truths", help="folder for models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    truth = evaluate.truth(f"{setting.name}-lds")
    scores = np.load(arguments.scores)
    if scores.shape != truth.shape:
        raise SystemExit(f"{arguments.scores} holds {scores.shape}, expected {truth.shape}.")
    found = removal(setting, scores[truth.rows["generated"]], queries=arguments.queries)
    line = {
        f"{what}, beyond {other}": asdict(found.beyond(what, other))
        for what in ("loss", "image")
        for other in ("random", "others")
    }
    file = HERE / "results" / f"removal-{setting.name}.json"
    lines = json.loads(file.read_text()) if file.exists() else {}
    lines[arguments.method] = {"queries": arguments.queries, **line}
    file.write_text(json.dumps(lines, indent=1) + "\n")
    for name, interval in line.items():
        print(f"{arguments.method}: {name} {interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]")


if __name__ == "__main__":
    main()
