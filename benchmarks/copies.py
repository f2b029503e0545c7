"""Are copies of a training image told from other images, and folded?

    python -m benchmarks.copies                                        # of digits8
    python -m benchmarks.copies --setting emoji16 --folder FOLDER      # of the emoji tarballs

48 training images are planted again, 16 each 1, 4 and 16 times: the same pixels, each copy with noise of its own, or
each altered in one of the ways in which `retrac-scale check` alters. Every planted image is asked about. Over the
candidates of all lists, how alike a candidate and the planted image are tells whether it is a copy: AUROC. By "fold"
then, how many copies stand with their image, how many stand elsewhere in its list of ten, and how many images were
folded into another one that they are no copy of. The model is the setting's, which saw the planted images once; it is
trained first (minutes) unless it is there. Tables go to benchmarks/results/copies-SETTING.md.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from retrac_scale import evaluate
from retrac_scale.evaluate.originals import ASKED, alter
from retrac_scale.evaluate.settings import SETTINGS
from retrac_scale.query.copies import FEWEST, likeness

HERE = Path(__file__).parent
TIMES, EACH = (1, 4, 16), 16
NOISE = 0.1
K = 10
ESTIMATORS = {"ReTracRidge": rs.ReTracRidge(), "ReTrac, matched": rs.ReTrac(pairing="matched")}


def planted(images: Tensor, family: Any, how: str) -> Tensor:
    """Copies of images, `[n, c, h, w]`."""
    if how == "same pixels":
        return images[family]
    if how == "noise of its own":
        drawn = torch.randn(images[family].shape, generator=torch.Generator().manual_seed(0))
        return images[family] + NOISE * drawn
    ways = np.resize([one for one in ASKED if one not in ("plain", "noisy")], len(family))
    return torch.cat([alter(images[row : row + 1], way) for row, way in zip(family.tolist(), ways, strict=True)])


def auroc(of_copies: Any, of_others: Any) -> float:
    """The chance that a copy's value is above another's."""
    values = np.concatenate([of_copies, of_others])
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    for value in np.unique(of_copies):  # ties count one half
        ranks[values == value] = ranks[values == value].mean()
    n = len(of_copies)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(of_others)))


def measured(index: rs.Index, queries: rs.SketchStore, family: Any) -> dict[Any, list[Any]]:
    """For each number of copies: how alike copies and others are; copies folded and elsewhere, others folded."""
    candidates, answer = index.query(queries, FEWEST), index.query(queries, K, duplicates="fold")
    assert answer.copies is not None
    counts = np.bincount(family)
    found: dict[Any, list[Any]] = {times: [[], [], 0, 0, 0] for times in TIMES}
    for query, own in enumerate(queries.ids.tolist()):
        of_copies, of_others, *_ = row = found[int(counts[family[own]]) - 1]
        names = np.concatenate([[own], candidates.ids[query][candidates.ids[query] != own]])
        alike, copies = likeness(index, names)[0, 1:], family[names[1:]] == family[own]
        of_copies.extend(alike[copies])
        of_others.extend(alike[~copies])
        for kept, rest in zip(answer.ids[query], answer.copies[query], strict=True):
            members = np.array([kept, *rest])
            its_own = int((family[members] == family[own]).sum())
            row[2 if own in members else 3] += its_own - (own in members)
            row[4] += len(members) - max(np.bincount(family[members]))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="digits8")
    parser.add_argument("--folder", help="of the emoji tarballs")
    parser.add_argument("--work", help="where models are kept (default: retrac_scale in the user's cache folder)")
    arguments = parser.parse_args()
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    task = rs.DiffusionTask(setting.build(), setting.scheduler)
    checkpoints = dict([list(setting.checkpoints.items())[-1]])
    chosen = np.random.default_rng(0).permutation(len(setting.images))[: EACH * len(TIMES)]
    copied = np.repeat(chosen, np.repeat(TIMES, EACH))
    family = np.concatenate([np.arange(len(setting.images)), copied])
    head = "| copies | estimator | times | AUROC | folded | elsewhere in the list | no copies, folded |"
    lines, started = [head, "| --- | --- | --- | --- | --- | --- | --- |"], time.perf_counter()
    for how in ("same pixels", "noise of its own", "moved, darker or JPEG"):
        images = torch.cat([setting.images, planted(setting.images, copied, how)])
        store = rs.sketch(task, images, None, checkpoints=checkpoints, batch_size=32, progress=False)
        for name, estimator in ESTIMATORS.items():
            index = rs.build_index(store, estimator, None)
            for times, row in measured(index, rs.take(store, chosen), family).items():
                of_copies, of_others, folded, lost, others = row
                told = f"{auroc(np.array(of_copies), np.array(of_others)):.3f} | {folded} of {times * EACH} | {lost}"
                lines.append(f"| {how} | {name} | {times} | {told} | {others} |")
                print(lines[-1], flush=True)
    about = [
        f"`python -m benchmarks.copies --setting {setting.name}`, {datetime.date.today()}, {cpu_name()}; torch",
        f"{torch.__version__}; {time.perf_counter() - started:.0f} s. Written by that command.\n",
        f"{len(setting.images)} training images and {len(copied)} copies of {len(chosen)}, at 4 timesteps of 512",
        f"entries; lists of {K}, of {len(chosen)} queries. AUROC among the best {FEWEST} of each.\n",
    ]
    text = "\n".join([f"# Copies: {setting.name}\n", *about, *lines, ""])
    (HERE / "results" / f"copies-{setting.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
