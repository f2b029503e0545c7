"""Whose part is it: pictures put together from two training pictures, asked about part by part.

    python -m benchmarks.regions --setting emoji16 --folder FOLDER     # of the emoji tarballs
    python -m benchmarks.regions --setting shapes16

Two training pictures make one: its left half is the first's and its right half the second's, or its middle is the
first's and the rest the second's; as they are, or each shifted by a pixel, a tenth darker, or enlarged by a seventh
before. Only parts that no other training picture has the like of are taken: who else could be named is no error.
Precision@1 is the share of the parts whose source is named first. "Of parts" asks another store, of what lies in the
training pictures where the part lies. "Views" are of nine kinds: as it is, moved to each side, smaller, larger, lighter
and darker. Asked in views, a picture is seen so with its part (`Samples(views=True)`); sketched in views, every
training picture is (`Views(train)`); a training picture's best score counts. The same is done for pixels. RelatIF is
that of directions, matched, at a damping of 0.1.
The model is trained first (minutes) unless it is there, and stores are kept beside it. The table goes to
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
RECIPE, OWN, OF_PARTS = "ReTracRidge", "RelatIF", "RelatIF of parts"
WAYS = ("as it is", "asked in views", "sketched in views")
WHOLE = "ReTracRidge, whole picture"
LEFT_OUT = tuple(f"{name}, {WAYS[2]}" for name in (RECIPE, OF_PARTS, "masked pixel ridge"))


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
    return alter(images, how)


def distinct(images: Tensor, mask: Tensor) -> Any:
    """Images whose part is not like that of another, by number."""
    inside = images[:, :, mask.bool()].flatten(1)
    apart = torch.cdist(inside, inside) / inside.shape[1] ** 0.5
    return np.flatnonzero(apart.fill_diagonal_(torch.inf).min(1).values.numpy() > ALIKE)


def pixels_within(train: Tensor, asked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of training pictures and those that are asked about, `[n, entries]`, less the training pictures' mean."""
    own, theirs = (images[:, :, mask > 0.5].flatten(1).double() for images in (train, asked))
    return own - own.mean(0), theirs - own.mean(0)


def ridge(own: Tensor, theirs: Tensor) -> Any:
    """The recipe's, of pixels."""
    train, asked = (F.normalize(pixels, eps=1e-12).numpy() for pixels in (own, theirs))
    return damped(train, asked, [AUTO])[0]


def nearest(own: Tensor, theirs: Tensor) -> Any:
    """Minus the distances."""
    return -torch.cdist(theirs, own).numpy()


PIXELS = {"masked pixel ridge": ridge, "masked pixels, nearest": nearest}


def write_page(setting: Any, shape: Any, seconds: float, table: dict[str, list[str]]) -> None:
    """A row for each method, a column for each kind of composites."""
    _, t, k = shape
    told = f" --timesteps {t} --entries {k}" if (t, k) != (12, 2048) else ""
    about = [
        f"`python -m benchmarks.regions --setting {setting.name}{told}`, {datetime.date.today()}, {cpu_name()}; torch",
        f"{torch.__version__}. Written by that command.\n",
        f"{len(setting.train)} training images at {t} timesteps of {k} entries; {seconds:.0f} s, stores of before",
        f"not counted. Precision@1 of {2 * COMPOSITES} parts each; brackets: 95 % intervals over the composites.\n",
    ]
    columns = [f"{layout}, {how}" for layout in layouts(setting.images.shape[-1]) for how in ALTERED]
    head = [f"| method | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in table.items()]
    text = "\n".join([f"# Parts of pictures: {setting.name}\n", *about, *head, *lines, ""])
    (HERE / "results" / f"regions-{setting.name}.md").write_text(text, encoding="utf-8")


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
    folder = setting.work / f"regions-{arguments.timesteps}-{arguments.entries}"
    plan, projection = rs.EvenlySpaced(arguments.timesteps), rs.LowRank(dim=arguments.entries)
    options = {"checkpoints": checkpoints, "timesteps": plan, "projection": projection, "batch_size": 32}
    train, n = setting.train, len(setting.train)
    seen = torch.stack([view.of(setting.images) for view in VIEWS.values()], 1).flatten(0, 1)

    def index(name: str, dataset: Any, estimator: rs.Estimator | None) -> rs.Index:
        store = rs.sketch(task, dataset, folder / f"{name}.zarr", **options)  # type: ignore[arg-type]
        return rs.build_index(store, estimator, None)

    def best(scores: Any, *, of_training: bool = False) -> Any:
        """Which training picture is named first, of scores `[n, views, N]`, or `[n, N views]`."""
        return (scores.reshape(len(scores), n, -1).max(2) if of_training else scores.max(1)).argmax(1)

    whole = {RECIPE: index("whole", train, None), OWN: index("whole", train, RELATIF)}
    whole_in_views = index("views", rs.Views(train), RELATIF)
    store = rs.open_store(folder / "whole.zarr")
    methods = [f"{name}, {way}" for name in (RECIPE, OWN, OF_PARTS, *PIXELS) for way in WAYS]
    methods = [name for name in methods if name not in LEFT_OUT] + [WHOLE]

    def first(asked: Any, mask: Tensor, of_part: rs.Index) -> dict[str, Any]:
        """Which training picture each method names first for a part of each picture, `[n]`."""
        samples = rs.Samples(rs.Regions(asked, mask), task, checkpoints, views=True)
        sketches = samples.sketch(like=store)
        plain = rs.Samples(rs.Regions(asked, mask), task, checkpoints).sketch(like=store)
        found: dict[str, Any] = {}
        for name, one in {**whole, OF_PARTS: of_part}.items():
            scores = np.asarray(one.scores(sketches)).reshape(len(asked), len(VIEWS), n)
            found |= {f"{name}, {WAYS[0]}": best(scores[:, :1]), f"{name}, {WAYS[1]}": best(scores)}
        found[f"{OWN}, {WAYS[2]}"] = best(np.asarray(whole_in_views.scores(plain)), of_training=True)
        within = [(view.of(asked.images), view.placed(mask[None, None], "zeros")[0, 0]) for view in VIEWS.values()]
        pixels = [pixels_within(setting.images, images, place) for images, place in within]
        for name, score in PIXELS.items():
            scores = np.stack([score(*one) for one in pixels], 1)
            found |= {f"{name}, {WAYS[0]}": best(scores[:, :1]), f"{name}, {WAYS[1]}": best(scores)}
        found[f"{name}, {WAYS[2]}"] = best(nearest(*pixels_within(seen, asked.images, mask)), of_training=True)
        return found

    rng = np.random.default_rng(0)
    table: dict[str, list[str]] = {name: [] for name in methods}
    started = time.perf_counter()
    for layout, mask in layouts(setting.images.shape[-1]).items():
        masks = [mask, 1 - mask]
        own = [distinct(setting.images, inside) for inside in masks]
        drawn = np.stack([rng.choice(some, 2 * COMPOSITES) for some in own], 1)
        sources = drawn[drawn[:, 0] != drawn[:, 1]][:COMPOSITES]
        of_parts = [index(f"{layout}-{part}", rs.Regions(train, inside), RELATIF) for part, inside in enumerate(masks)]
        for how in ALTERED:
            parts = altered(setting.images, how)
            given = train.some(sources[:, 0])  # what the model is told beside, where it is told something
            made = parts[sources[:, 0]] * mask + parts[sources[:, 1]] * (1 - mask)
            asked = type(given)(made, "made", given.given)
            found = [first(asked, inside, of_part) for inside, of_part in zip(masks, of_parts, strict=True)]
            named = {name: np.stack([one[name] for one in found], 1) for name in found[0]}
            named[WHOLE] = whole[RECIPE].query(rs.Samples(asked, task, checkpoints), k=1).ids
            for name in methods:
                table[name].append(f"{evaluate.bootstrap(np.mean, named[name] == sources):.3g}")
                print(layout, how, name, table[name][-1], flush=True)
    write_page(setting, store.shape, time.perf_counter() - started, table)


if __name__ == "__main__":
    main()
