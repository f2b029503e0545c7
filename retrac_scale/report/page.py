"""The HTML page: each query beside its results under every estimator; one file, no network."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrac_scale.evaluate import largest_share, unique_fraction
from retrac_scale.query import TopK
from retrac_scale.report.figures import curve_uri
from retrac_scale.report.pictures import Pictures, data_uri

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #b3402a; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 54rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; } table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: .25rem 1.5rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.query { display: flex; flex-wrap: wrap; gap: 1rem 2rem; border-top: 1px solid var(--line); padding: 1rem 0; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; } .strip figure, .query > figure { margin: 0; }
.query img { width: 64px; image-rendering: pixelated; display: block; }
.query img { border-radius: 3px; outline: 1px solid var(--line); }
.query > figure img { outline: 2px solid var(--accent); } h3 { font-size: .9rem; margin: 0 0 .3rem; }
section + section { margin-top: .8rem; }
figcaption { font-size: .72rem; line-height: 1.3; margin-top: .2rem; text-align: center; }
figcaption { font-variant-numeric: tabular-nums; }
.curve { max-width: 100%; background: #fff; border-radius: 6px; }
"""


def write_report(
    path: str | os.PathLike[str],
    answers: Mapping[str, TopK],
    pictures: Pictures,
    *,
    title: str = "Attributions",
    curve: tuple[Any, Any, Any] | None = None,
) -> Path:
    """Write a self-contained page.

    Args:
        path: the file to write.
        answers: {estimator: TopK} for the same queries in the same order.
        pictures: of training samples and queries.
        title: heading of the page.
        curve: from `norm_curve`, shown when given.
    """
    counts = {len(answer.ids) for answer in answers.values()}
    if counts != {len(pictures.queries)}:
        raise ValueError(
            f"the answers are for {sorted(counts)} queries, but {len(pictures.queries)} pictures are given."
        )
    parts = [_summary(answers)]
    if curve is not None:
        parts.append(
            "<h2>Gradient norm against timestep</h2><p>Mean and standard deviation over samples and checkpoints. "
            "Where the norm is large, a sample trained at that timestep scores high for every query under TracIn; "
            "ReTrac divides the norm out.</p>"
            f'<img class="curve" alt="Gradient norm against timestep" src="{curve_uri(curve)}">'
        )
    parts.append("<h2>Queries</h2>")
    parts += [_query(place, answers, pictures) for place in range(len(pictures.queries))]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


def _summary(answers: Mapping[str, TopK]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{answer.side}</td>"
        f'<td class="number">{answer.ids.shape[1]}</td>'
        f'<td class="number">{unique_fraction(answer.ids):.3f}</td>'
        f'<td class="number">{largest_share(answer.ids):.0%}</td></tr>'
        for name, answer in answers.items()
    )
    return (
        "<p>The training samples with the largest influence on each query. A positive score means that training on the "
        "sample lowered the query's loss.</p><table><tr><th>estimator</th><th>side</th><th>list length</th>"
        f"<th>unique fraction</th><th>most frequent sample is in</th></tr>{rows}</table>"
    )


def _query(place: int, answers: Mapping[str, TopK], pictures: Pictures) -> str:
    name = html.escape(str(next(iter(answers.values())).query_ids[place]))
    strips = "".join(
        f'<section><h3>{html.escape(title)}</h3><div class="strip">'
        + "".join(
            _figure(
                data_uri(pictures.image(sample)),
                f"training sample {sample}",
                f"#{html.escape(str(sample))}<br>{score:#.3g}",
            )
            for sample, score in zip(answer.ids[place], answer.scores[place], strict=True)
        )
        + "</div></section>"
        for title, answer in answers.items()
    )
    return (
        f'<article class="query">{_figure(data_uri(pictures.query(place)), f"query {name}", f"query {name}")}'
        f"<div>{strips}</div></article>"
    )


def _figure(source: str, text: str, caption: str) -> str:
    return f'<figure><img alt="{html.escape(text)}" src="{source}"><figcaption>{caption}</figcaption></figure>'
