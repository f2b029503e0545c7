"""How the results of `benchmarks.measurement` are shown: tables, and two pictures for the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.paper_page import cell, table

KINDS = ("held out", "training", "generated")
STYLES = {"common": ("#1a73b8", "o"), "own": ("#b3411a", "s"), "the training's": ("#777777", "^")}


def cpu_name() -> str:
    """Of this machine, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "an unknown CPU")


def page(report: dict[str, Any]) -> str:
    """Markdown of the parts that there are."""
    text = [
        "# What takes the noise out of an answer",
        f"`{report['command']}`, {report['date']}, {report['machine']}. Written by that command.",
        f"{report['samples']} training images, {report['queries']} queries of each kind, {report['subsets']} models "
        "retrained on random halves of one seed. Brackets: 95 % intervals, of LDS over queries and subsets, of "
        "overlaps over queries and splits. Bytes and pairs: of a training sample; seconds: CPU time for sketching all. "
        "Halves: what the top-10 lists of two halves of the measurements share; foretold: for two whole runs.",
    ]
    if lines := report.get("rows"):
        head = ("noise", "method", "pairs", "bytes", "seconds")
        lds = [{key: line.get(key, "") for key in (*head, *(f"LDS, {kind}" for kind in KINDS))} for line in lines]
        squares = [
            {key: line.get(key, "") for key in ("noise", "method", *(f"squared, {kind}" for kind in KINDS))}
            for line in lines
        ]
        keys = ("halves", "foretold", "rank correlation", "halves, generated", "unique fraction")
        agreed = [{key: line.get(key, "") for key in ("noise", "method", *keys)} for line in lines]
        first = [name for name in lines[0] if name.endswith(" first")]
        traced = [{key: line.get(key, "") for key in ("noise", "method", *first)} for line in lines]
        text += ["## LDS", table(lds), "## LDS of squared scores", table(squares)]
        text += ["## Repeatability and specificity", table(agreed)]
        text += ["## Altered copies of training images: share whose original comes first", table(traced)]
    if lines := report.get("dampings"):
        text += ["## LDS of the recipe by damping, relative to the mean of min(N, k) eigenvalues", table(lines)]
    if lines := report.get("forecasts"):
        text += ["## Repeatability foretold from few timesteps, and found", table(lines)]
    return "\n\n".join(text) + "\n"


def pictures(report: dict[str, Any], setting: str, folder: Path) -> None:
    """LDS against pairs and against bytes of a sample, held-out queries, with the cheap baselines as lines."""
    if not report.get("rows"):
        return
    for axis_name in ("pairs", "bytes"):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        for axis, key, title in (
            (axes[0], "LDS, held out", "score"),
            (axes[1], "squared, held out", "squared score"),
        ):
            for line in report["rows"]:
                if line["noise"] not in STYLES or not line.get("bytes"):
                    if line["method"].startswith(("pixel ridge", "middle activations")):
                        axis.axhline(line[key]["value"], color="#999", lw=1, ls=":")
                        axis.text(
                            0.99,
                            line[key]["value"],
                            line["method"],
                            transform=axis.get_yaxis_transform(),
                            ha="right",
                            va="bottom",
                            fontsize=7,
                        )
                    continue
                colour, marker = STYLES[line["noise"]]
                value, low, high = (line[key][name] for name in ("value", "low", "high"))
                ridge = "ReTracRidge" in line["method"]
                axis.errorbar(
                    line[axis_name],
                    value,
                    yerr=[[max(0, value - low)], [max(0, high - value)]],
                    fmt=marker,
                    color=colour,
                    mfc=colour if ridge else "white",
                    ms=6,
                    capsize=2,
                    lw=0.8,
                )
            axis.set(xscale="log", xlabel=f"{axis_name} per sample", title=title)
            axis.axhline(0, color="#ccc", lw=1)
        axes[0].set_ylabel("LDS, held-out queries")
        for noise, (colour, marker) in STYLES.items():
            axes[0].plot(
                [], [], marker, color=colour, label=f"{noise} noise" if noise != "the training's" else "recorded"
            )
        axes[0].plot([], [], "o", color="#444", label="ReTracRidge")
        axes[0].plot([], [], "o", color="#444", mfc="white", label="other estimators")
        axes[0].legend(fontsize=7)
        figure.savefig(folder / f"measurement-{setting}-{axis_name}.png", dpi=110)
        plt.close(figure)


__all__ = ["cell", "cpu_name", "page", "pictures"]
