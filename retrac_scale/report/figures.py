"""Figures: queries beside their proponents, and gradient norm against timestep."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from retrac_scale.query.topk import TopK
from retrac_scale.report.content import list_length
from retrac_scale.report.pictures import Pictures, is_tiny
from retrac_scale.store import SketchStore
from retrac_scale.store.part import measures_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS, CURVE_SAMPLES = 25, 2**17
WIDTH, EDGE, CURVE, HEADING, LINE = 9.6, 0.06, 2.7, 0.27, 0.16
"""Inches: of a figure, of its edge, of the curve's height with its labels, of a title, of a caption's line."""
ACROSS, FEWEST = 18, 3
"""Pictures side by side, in all and of one estimator."""
LARGEST, GAP = 0.9, 0.35
"""Inches of a picture; room between estimators, in pictures."""
CHARACTERS = 14
"""Of a caption, to the inch."""
QUIET = "#5c5852"


def norm_curve(store: SketchStore) -> tuple[Any, Any, Any]:
    """Gradient norm by timestep, pooled over checkpoints, the samples that are not deleted and the visits made.

    Of a store of more than 2^17 samples it is that of about so many, of whole blocks from all over; under several
    measures that of the first, for norms of different functions have no mean.

    Returns:
        centres of 25 timestep bins, and the mean and the standard deviation of the norms in each; empty bins left out.
    """
    first, *others = measures_in(store.fingerprint)
    store = store.under(first) if others else store
    alive = store.alive
    some = store.blocks[:: max(1, len(alive) // CURVE_SAMPLES)]
    read = [(name, block) for name in store.checkpoints for block in some]
    steps = np.concatenate([store.timesteps(name, block)[alive[block]].ravel() for name, block in read])
    norms = np.concatenate([store.norms(name, block)[alive[block]].ravel() for name, block in read])
    made = steps >= 0
    if not made.any():
        return np.empty(0), np.empty(0), np.empty(0)
    steps, norms = steps[made], norms[made]
    edges = np.linspace(steps.min(), steps.max() + 1, BINS + 1)
    places = np.digitize(steps, edges) - 1
    used = [b for b in range(BINS) if (places == b).any()]
    centres = ((edges[:-1] + edges[1:]) / 2)[used]
    return (
        centres,
        np.array([norms[places == b].mean() for b in used]),
        np.array([norms[places == b].std() for b in used]),
    )


def attribution_figure(
    answers: Mapping[str, TopK],
    pictures: Pictures,
    curve: tuple[Any, Any, Any],
    captions: Mapping[str, str],
    rows: int = 8,
) -> Figure:
    """Queries down the side, top proponents under each estimator, the norm curve below; to be read at a README's width.

    Args:
        answers: {title: TopK} for the same queries, side by side.
        pictures: of samples and queries.
        curve: from `norm_curve`.
        captions: {title: a line}, broken where it is wider than the pictures below it; titles may be left out.
        rows: how many queries to show.
    """
    from matplotlib.figure import Figure  # half a second, which a page has no use for

    shown = min(rows, len(next(iter(answers.values())).ids))
    columns = min(max(FEWEST, ACROSS // len(answers)), *map(list_length, answers.values()))
    cell = min(LARGEST, (WIDTH - 2 * EDGE) / (1 + len(answers) * (columns + GAP)))
    characters = max(8, int(columns * cell * CHARACTERS))
    lines = {title: textwrap.wrap(captions.get(title, ""), characters) for title in answers}
    heading = HEADING + LINE * max(map(len, lines.values()))
    height = heading + shown * cell + CURVE
    figure = Figure(figsize=(WIDTH, height))

    def place(left: float, below: float) -> tuple[float, float]:
        """A point so many inches from the left and the top."""
        return (EDGE + left) / WIDTH, 1 - below / height

    def panel(left: float, title: str, caption: list[str], grid: list[list[Any]]) -> None:
        """Pictures `[row][column]` under their title."""
        figure.text(*place(left, 0.05), title, fontsize=11, weight="bold", va="top", parse_math=False)
        text = "\n".join(caption)
        figure.text(*place(left, HEADING), text, fontsize=9, color=QUIET, va="top", linespacing=1.15, parse_math=False)
        width = len(grid[0])
        x, y = place(left, heading + shown * cell)
        axes = figure.add_axes((x, y, width * cell / WIDTH, shown * cell / height))
        axes.axis("off")
        for row, images in enumerate(grid):
            for column, image in enumerate(images):
                _show(axes, image, column, row)
        axes.set(xlim=(0, width), ylim=(shown, 0), aspect="auto")  # last: each picture sets them

    panel(0, "", ["query"], [[pictures.query(row)] for row in range(shown)])
    for number, (title, answer) in enumerate(answers.items()):
        left = cell * (1 + GAP + number * (columns + GAP))
        panel(left, title, lines[title], [[pictures.image(id) for id in ids[:columns]] for ids in answer.ids[:shown]])
    bottom = figure.add_axes((0.75 / WIDTH, 0.5 / height, 1 - 0.9 / WIDTH, (CURVE - 0.75) / height))
    _draw_curve(bottom, curve)
    return figure


def _draw_curve(axes: Axes, curve: tuple[Any, Any, Any]) -> None:
    centres, mean, deviation = curve
    axes.plot(centres, mean, color="#b3402a")
    axes.fill_between(centres, np.maximum(mean - deviation, 0), mean + deviation, color="#b3402a", alpha=0.2, lw=0)
    axes.set(xlabel="diffusion timestep", ylabel="gradient norm, mean ± s.d.", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def _show(axes: Axes, image: Any, column: int, row: int) -> None:
    """A picture in its cell, of its own shape, with a little room around it."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[0] / max(image.shape[:2]), image.shape[1] / max(image.shape[:2])
    across, down = (0.94 * width / 2, 0.94 * height / 2)
    extent = (column + 0.5 - across, column + 0.5 + across, row + 0.5 + down, row + 0.5 - down)
    smooth = "bilinear" if is_tiny(image) else None
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation=smooth)
    axes.add_patch(Rectangle((extent[0], extent[3]), 2 * across, 2 * down, fill=False, ec="#bbb", lw=0.6))
