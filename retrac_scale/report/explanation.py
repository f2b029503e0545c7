"""The picture of an explanation: checkpoints against timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from retrac_scale.explain import Explanation


def explanation_figure(explanation: Explanation) -> Figure:
    """What each checkpoint (row) and query timestep (column) adds to the score; red raises it, blue lowers it."""
    values = explanation.contributions.sum(1)
    figure = Figure(figsize=(2.5 + 0.35 * values.shape[1], 1.8 + 0.4 * values.shape[0]), layout="constrained")
    axes: Any = figure.subplots()
    limit = max(float(np.abs(values).max()), 1e-30)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    figure.colorbar(image, label="contribution")
    axes.set_yticks(range(len(values)), explanation.checkpoints, parse_math=False)
    steps = explanation.query_timesteps
    if steps is not None and (steps == steps[0]).all():
        axes.set_xticks(range(values.shape[1]), steps[0], rotation=90 if values.shape[1] > 8 else 0)
    axes.set_xlabel("timestep of the query")
    title = f"query {explanation.query_id}, sample {explanation.id}: score {explanation.score:.4g}"
    axes.set_title(title, fontsize=10, parse_math=False)  # names may hold dollar signs
    return figure
