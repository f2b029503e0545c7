"""The HTML page: one self-contained file, no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from retrac_scale.measurement.halves import Repeatability
from retrac_scale.query.index import Index
from retrac_scale.query.topk import TopK
from retrac_scale.report.content import content
from retrac_scale.report.pictures import Pictures
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from retrac_scale.evaluate.originals import Originals


def write_report(
    path: str | os.PathLike[str],
    answers: Mapping[str, TopK],
    pictures: Pictures,
    *,
    title: str = "Attributions",
    curve: tuple[Any, Any, Any] | None = None,
    indexes: Mapping[str, Index] | None = None,
    queries: SketchStore | Mapping[str, SketchStore] | None = None,
    repeatability: Mapping[str, Repeatability | str] | None = None,
    check: Mapping[str, Originals] | None = None,
) -> Path:
    """Write a self-contained page.

    Args:
        path: the file to write.
        answers: {estimator: TopK} for the same queries in the same order.
        pictures: of training samples and queries.
        title: heading of the page.
        curve: from `norm_curve`, shown when given.
        indexes: {estimator: index} that gave the answers; with `queries` they add the columns, group totals, and what
            each checkpoint and timestep contributes.
        queries: the sketches that were asked: one store for all indexes, or {estimator: store}, the same queries in the
            same order, where the indexes were measured at different timesteps or under different noise.
        repeatability: {estimator: what `rs.repeatability` found with these queries, or a sentence why it is not told};
            None measures it where that is cheap: under matched pairing, and under cross pairing for small stores, of
            lists of all samples, so that answers under `where=` need it given.
        check: {estimator: what `rs.evaluate.find_originals` found}, told where it is given.

    Raises:
        ValueError: pictures, queries, indexes and repeatability do not belong together; says which.
    """
    counts = {len(answer.ids) for answer in answers.values()}
    if counts != {len(pictures.queries)}:
        raise ValueError(
            f"the answers are for {sorted(counts)} queries, but {len(pictures.queries)} pictures are given."
        )
    of_measurement: dict[str, Any] = {"curve": curve, "repeatability": repeatability, "check": check}
    found = content(answers, pictures, title=title, indexes=indexes, queries=queries, **of_measurement)
    target = Path(path)
    target.write_text(page(title, found), encoding="utf-8")
    return target


def page(title: str, found: Mapping[str, Any], *scripts: str) -> str:
    """The page's HTML.

    Args:
        title: of the document.
        found: what it shows, from `content`, or where it asks.
        scripts: further JavaScript, run after the page's own.
    """
    style, script = _file("page.css"), "\n".join([_file("page.js"), _file("overview.js"), *scripts, "start();"])
    return Template(_file("page.html")).substitute(
        title=html.escape(title),
        style=style,
        script=script,
        content=embed(found),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def embed(value: Any) -> str:
    """JSON that can stand in a script element whatever strings it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return resources.files("retrac_scale.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names a script: nothing else runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
