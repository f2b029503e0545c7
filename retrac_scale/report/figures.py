"""Figures: queries beside their proponents, and gradient norm against timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retrac_scale.report.pictures import Pictures
from retrac_scale.store import SketchStore
from retrac_scale.topk import TopK

BINS = 25


def norm_curve(store: SketchStore) -> tuple[Any, Any, Any]:
    """Gradient norm by timestep, pooled over checkpoints, the samples that are not deleted and the visits made.

    Returns:
        centres of 25 timestep bins, and the mean and the standard deviation of the norms in each; empty bins left out.
    """
    alive = store.alive
    steps = np.concatenate([store.timesteps(name)[alive].ravel() for name in store.checkpoints])
    norms = np.concatenate([store.norms(name)[alive].ravel() for name in store.checkpoints])
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
    """Queries down the side, top proponents under each estimator, the norm curve below.

    Args:
        answers: {title: TopK} for the same queries.
        pictures: of samples and queries.
        curve: from `norm_curve`.
        captions: one line per title.
        rows: how many queries to show.
    """
    shown = min(rows, len(next(iter(answers.values())).ids))
    columns = min(8, min(answer.ids.shape[1] for answer in answers.values()))
    figure = Figure(figsize=(2 + len(answers) * columns * 0.62, shown * 0.66 + 3.4), layout="constrained")
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[shown * 0.66 + 0.6, 2.8])
    top, bottom = subfigures
    parts = top.subfigures(1, 1 + len(answers), width_ratios=[1.2] + [columns] * len(answers))
    axes = parts[0].subplots(shown, 1, squeeze=False)
    parts[0].suptitle("generated", fontsize=10)
    for row in range(shown):
        _show(axes[row, 0], pictures.query(row))
    for part, (title, answer) in zip(parts[1:], answers.items(), strict=True):
        axes = part.subplots(shown, columns, squeeze=False)
        part.suptitle(f"{title}: {captions[title]}", fontsize=10)
        for row in range(shown):
            for column in range(columns):
                _show(axes[row, column], pictures.image(answer.ids[row, column]))
    _draw_curve(bottom.subplots(), curve)
    return figure


def _draw_curve(axes: Axes, curve: tuple[Any, Any, Any]) -> None:
    centres, mean, deviation = curve
    axes.plot(centres, mean, color="#b3402a")
    axes.fill_between(centres, np.maximum(mean - deviation, 0), mean + deviation, color="#b3402a", alpha=0.2, lw=0)
    axes.set(xlabel="diffusion timestep", ylabel="gradient norm, mean ± s.d.", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def _show(axes: Axes, image: Any) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#bbb")
