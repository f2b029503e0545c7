"""How the results of `benchmarks.paper` are shown: tables, figures, one page."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INTRODUCTION = """`{command}`, seed {seed}, {machine}. Written by that command.

Data: {data}. The model of the LDS and removals is {model}, trained on {size} images for
{epochs} epochs, checkpoints after {kept}.{demo} Queries: {queries} images that the last checkpoint generates and,
of this model, as many held-out ones (validation), averaged over {timesteps} evenly spaced timesteps, with noise of
their own. Training side, "recorded": each sample at the timestep and noise that it was last trained at, checkpoints
weighted by their learning rates; "averaged": over the grid of the queries, checkpoints weighted alike. Sketches:
CountSketch({dim}).

Brackets: 95 % intervals; of unique fractions by the jackknife over queries, of LDS by a bootstrap over queries and
subsets together, of norm correlations by one over samples, of detection by one over planted and other samples
apart, of the rest by one over queries. Hubs: samples that stand in at least {share:.0%} of the lists. LDS:
{subsets} subsets of half the samples, one model each, all of one seed; a query's loss is averaged over 50 timesteps
and 2 noises; larger is better. Removal: of {removed} samples; a positive change means that the query's loss rose."""

DEMO = """ "16 x 16" is the model, data and training of the demo on these dates, digits and 36 photograph patches; its
averages are over {timesteps} timesteps."""


def page(report: dict[str, Any], titles: dict[str, str]) -> str:
    """Markdown of the parts that there are, in the order of the titles."""
    how = report["setting"]
    training = {key: ", ".join(map(str, x)) if isinstance(x, list) else x for key, x in how["training"].items()}
    size = "all" if how["samples"] is None else how["samples"]
    demo = DEMO.format(timesteps=how["demo_timesteps"]) if how["demo_timesteps"] else ""
    model = (
        "a Stable Diffusion with LoRA adapters of rank {rank}"
        if "rank" in training
        else "a U-Net with {channels} channels"
    )
    introduction = INTRODUCTION.format(
        **report, **how, **training, size=size, demo=demo, model=model.format(**training)
    )
    paragraphs = [textwrap.fill(" ".join(part.split()), 120) for part in introduction.split("\n\n")]
    sections = [
        f"## {titles[name]}\n\n{report['dates'][name]}\n\n{table(report['results'][name])}"
        for name in titles
        if report["results"].get(name)
    ]
    title = "at digits size" if how["data"] == "digits" else f"on {how['data']}"
    return "\n\n".join([f"# The paper's experiments {title}", *paragraphs, *sections]) + "\n"


def cell(value: Any) -> str:
    """For a table; intervals and figures to three digits."""
    if isinstance(value, dict):
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = [columns, ["---"] * len(columns), *([cell(line.get(key, "")) for key in columns] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(results: dict[str, list[dict[str, Any]]], dampings: list[float], out: Path) -> None:
    """The figures, of the parts that there are."""
    if lines := results.get("norms"):
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        for model in dict.fromkeys(line["model"] for line in lines):
            chosen = [line for line in lines if line["model"] == model]
            steps, mean, deviation = (
                np.array([line[key] for line in chosen]) for key in ("timestep", "mean", "standard deviation")
            )
            axes.plot(steps, mean, label=model)
            axes.fill_between(steps, np.maximum(mean - deviation, 0), mean + deviation, alpha=0.2, lw=0)
        axes.legend()
        axes.set(xlabel="timestep", ylabel="gradient norm, mean ± s.d.", ylim=(0, None))
        figure.savefig(out / "paper-norms.png", dpi=110)
    if lines := results.get("datamodels"):
        figure, axes = plt.subplots(1, 2, figsize=(9, 0.28 * len(lines) + 1), sharey=True, layout="constrained")
        for axis, word in zip(axes, ("validation", "generated"), strict=True):
            rows = [row for row, line in enumerate(lines) if word in line]
            value, low, high = (np.array([lines[row][word][key] for row in rows]) for key in ("value", "low", "high"))
            axis.errorbar(value, rows, xerr=np.abs([value - low, high - value]), fmt="o", ms=4, capsize=2)
            axis.axvline(0, color="#bbb", lw=1)
            axis.set(title=f"{word} queries", xlabel="LDS, 95 % interval")
        axes[0].set_yticks(range(len(lines)), [f"{line['estimator']} ({line['checkpoints']})" for line in lines])
        axes[0].invert_yaxis()
        figure.savefig(out / "paper-lds.png", dpi=110)
    if lines := results.get("dampings"):
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        for word in ("validation", "generated"):
            axes.semilogx(dampings, [line[word] for line in lines[1:-1]], label=word)
            axes.axhline(
                lines[0][word], color=axes.lines[-1].get_color(), ls=":", label=f"{word}, chosen without labels"
            )
        axes.set(xlabel="damping, relative to the mean eigenvalue", ylabel="LDS of TRAK")
        axes.legend(fontsize=8)
        figure.savefig(out / "paper-damping.png", dpi=110)
    plt.close("all")
