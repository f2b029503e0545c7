"""Whose part is it: pictures put together from two training pictures, asked about part by part.

    python -m benchmarks.regions --setting emoji16 --folder FOLDER     # of the emoji tarballs
    python -m benchmarks.regions --setting shapes16

Two training pictures make one: its left half is the first's and its right half the second's, or its middle is the
first's and the rest the second's; as they are, or each shifted by a pixel, a tenth darker, or enlarged by a seventh
before. Only parts that no other training picture has the like of are taken: who else could be named is no error.
Precision@1 is the share of the parts whose source is named first. "Views" asks nine times, about the picture as it is,
moved to each side, smaller, larger, lighter and darker, the part with it, and takes a training picture's best score, as
`Samples(views=True)` does; the same is done for pixels. RelatIF is that of directions, matched, at a damping of 0.1.
The model is trained first (minutes) unless it is there, and the store, which knows nothing of regions, is kept beside
it. "Of parts" asks a second store, of what lies in the training pictures where the part lies. The table goes to
benchmarks/results/regions-SETTING.md.
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
from torch.nn import functional as F

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.yardstick_lab import damped
from retrac_scale import evaluate
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate.originals import alter
from retrac_scale.evaluate.settings import SETTINGS
from retrac_scale.task.views import VIEWS

HERE = Path(__file__).parent
COMPOSITES = 50
"""Of each kind."""
ALIKE = 0.1
"""Root mean square difference, of 2, below which two training pictures' parts are alike."""
ALTERED = ("plain", "shifted", "darker", "enlarged")
RELATIF = rs.RelatIF(0.1, pairing="matched", directions=True)
ESTIMATORS = {"region": None, "region, RelatIF": RELATIF}
OF_PARTS = "RelatIF of parts"
PIXELS = ("masked pixel ridge", "masked pixels, nearest")
METHODS = (*(f"{name}{how}" for name in (*ESTIMATORS, OF_PARTS, *PIXELS) for how in ("", ", views")), "whole picture")


def layouts(size: int) -> dict[str, Tensor]:
    """Where the first picture stands, `[size, size]` of zeros and ones."""
    left, middle = torch.zeros(2, size, size)
    left[:, : size // 2] = 1
    middle[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return {"left and right": left, "middle and rest": middle}


def altered(images: Tensor, how: str) -> Tensor:
    """Images in -1 .. 1, `[n, c, h, w]`, as the parts are before they are put together."""
    if how == "plain":
        return images
    if how == "enlarged":
        size = images.shape[-1]
        larger = F.interpolate(images, size=round(size * 8 / 7), mode="bilinear", antialias=True)
        start = (larger.shape[-1] - size) // 2
        return larger[..., start : start + size, start : start + size]
    return alter(images, how)  # type: ignore[no-any-return]


def distinct(images: Tensor, mask: Tensor) -> Any:
    """Images whose part is not like that of another, by number."""
    inside = images[:, :, mask.bool()].flatten(1)
    apart = torch.cdist(inside, inside) / inside.shape[1] ** 0.5
    return np.flatnonzero(apart.fill_diagonal_(torch.inf).min(1).values.numpy() > ALIKE)


def by_pixels(train: Tensor, asked: Tensor, mask: Tensor) -> dict[str, Any]:
    """What pixels within a mask score, `[n, N]`: by the recipe's ridge, and minus their mean square difference."""
    inside = mask > 0.5
    mean = train[:, :, inside].flatten(1).mean(0)
    own, theirs = ((x[:, :, inside].flatten(1) - mean).double().numpy() for x in (train, asked))
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (own, theirs)]
    apart = np.square(theirs[:, None] - own[None]).mean(2)
    return dict(zip(PIXELS, (damped(*unit, [AUTO])[0], -apart), strict=True))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="shapes16")
    parser.add_argument("--folder", help="of the emoji tarballs")
    parser.add_argument("--work", help="where models are kept (default: retrac_scale in the user's cache folder)")
    parser.add_argument("--timesteps", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--entries", type=int, default=2048, help="of each (default: 2048)")
    arguments = parser.parse_args()
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    task = rs.DiffusionTask(setting.build(), setting.scheduler)
    checkpoints = dict([list(setting.checkpoints.items())[-1]])
    place = setting.work / f"regions-{arguments.timesteps}-{arguments.entries}.zarr"
    plan, projection = rs.EvenlySpaced(arguments.timesteps), rs.LowRank(dim=arguments.entries)
    options = {"timesteps": plan, "projection": projection, "batch_size": 32}
    store = rs.sketch(task, setting.train, place, checkpoints=checkpoints, **options)  # type: ignore[arg-type]
    indexes = {name: rs.build_index(store, estimator, None) for name, estimator in ESTIMATORS.items()}

    def of_part(mask: Tensor) -> rs.Index:
        """Of what lies in a part of the training pictures."""
        part = rs.sketch(task, rs.Regions(setting.train, mask), None, checkpoints=checkpoints, like=store)
        return rs.build_index(part, RELATIF, None)

    def scored(asked: Any, masks: list[Tensor], parts: list[rs.Index]) -> dict[str, Any]:
        """Scores of parts in all views, `[n, parts, views, N]`, by each method."""
        regions = rs.Regions(asked, {str(place): mask for place, mask in enumerate(masks)})
        sketches = rs.Samples(regions, task, checkpoints, views=True).sketch(like=store)

        def of(index: rs.Index) -> Any:
            return np.asarray(index.scores(sketches)).reshape(len(asked), len(masks), len(VIEWS), -1)

        found = {name: of(index) for name, index in indexes.items()}
        found[OF_PARTS] = np.stack([of(index)[:, part] for part, index in enumerate(parts)], 1)
        for part, mask in enumerate(masks):
            for place, view in enumerate(VIEWS.values()):
                seen = view.placed(mask[None, None], "zeros")[0, 0]
                for name, scores in by_pixels(setting.images, view.of(asked.images), seen).items():
                    found.setdefault(name, np.empty(found["region"].shape))[:, part, place] = scores
        return found

    rng = np.random.default_rng(0)
    lines, queries = [], 0
    started = time.perf_counter()
    for layout, mask in layouts(setting.images.shape[-1]).items():
        masks = [mask, 1 - mask]
        of_parts = [of_part(inside) for inside in masks]
        own = [distinct(setting.images, inside) for inside in masks]
        drawn = np.stack([rng.choice(some, 2 * COMPOSITES) for some in own], 1)
        sources = drawn[drawn[:, 0] != drawn[:, 1]][:COMPOSITES]
        for how in ALTERED:
            parts = altered(setting.images, how)
            given = setting.train.some(sources[:, 0])  # what the model is told beside, where it is told something
            made = parts[sources[:, 0]] * mask + parts[sources[:, 1]] * (1 - mask)
            asked = type(given)(made, "made", given.given)
            scores = scored(asked, masks, of_parts)
            named = {name: by_view[:, :, 0].argmax(2) for name, by_view in scores.items()}
            named |= {f"{name}, views": by_view.max(2).argmax(2) for name, by_view in scores.items()}
            whole = rs.Samples(asked, task, checkpoints)
            named["whole picture"] = indexes["region"].query(whole, k=1).ids
            found = {name: first == sources for name, first in named.items()}
            queries += (2 * len(VIEWS) + 1) * COMPOSITES
            cells = [f"{evaluate.bootstrap(np.mean, found[name]):.3g}" for name in METHODS]
            lines.append(f"| {layout} | {how} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    _, t, k = store.shape
    told = f" --timesteps {t} --entries {k}" if (t, k) != (12, 2048) else ""
    about = [
        f"`python -m benchmarks.regions --setting {setting.name}{told}`, {datetime.date.today()}, {cpu_name()}; torch",
        f"{torch.__version__}. Written by that command.\n",
        f"{len(setting.train)} training images at {t} timesteps of {k} entries;",
        f"{queries} queries in {time.perf_counter() - started:.0f} s. Precision@1 of {2 * COMPOSITES} parts each;",
        f"brackets: 95 % intervals over {COMPOSITES} composites.\n",
    ]
    head = [f"| composites | parts | {' | '.join(METHODS)} |", f"| --- | --- |{' --- |' * len(METHODS)}"]
    text = "\n".join([f"# Parts of pictures: {setting.name}\n", *about, *head, *lines, ""])
    (HERE / "results" / f"regions-{setting.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
