"""Requests that nobody would write, for every route of the service: python -m benchmarks.service_fuzz [--examples N]

A tiny model, 24 images with a column of every type, and three indexes are served. Requests are made up from the
service's own OpenAPI schema, valid ones and such as break it; in half of those with a body what is named is put right,
and `where` is an expression over the columns, so that what lies behind the first check is reached too. Uploads are also
pictures in five formats, some of them damaged. An answer whose status the schema does not name, or of 500 or above,
ends it; one that took more than two seconds is printed.
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import status_code_conformance
from tqdm.auto import tqdm

from benchmarks.measurement_page import cpu_name
from retrac_scale.serve import create_app
from tests.served import HOSTILE, QUERIES, SAMPLES, build, running

LONGEST_S = 2.0
NUMBERS = np.arange(SAMPLES)
COLUMNS: dict[str, Any] = {
    "flag": NUMBERS % 2 == 0,
    **{f"{sign}int{bits}": NUMBERS.astype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{kind: np.where(NUMBERS % 5, NUMBERS / 3, np.nan).astype(kind) for kind in ("float16", "float32", "float64")},
    "most": np.where(NUMBERS % 2, np.iinfo(np.int64).max, np.iinfo(np.int64).min),
    "endless": np.where(NUMBERS % 2, np.inf, -np.inf),
    "text": np.array([["", "a", "Ä", "\U0001f600", HOSTILE][number % 5] for number in NUMBERS]),
}  # fmt: skip
INDEXES = ("TracIn", "ReTrac", "ReTracRidge")
WARM: dict[str, Any] = {
    "/api/query": {"source": "queries", "ids": ["0"], "where": "year > 0"},
    "/api/region": {"source": "queries", "id": "0", "box": [0, 0, 8, 4]},
    "/api/groups": {"source": "queries", "id": "0", "column": "artist"},
}
ADDED = {path: {"where"} for path in ("/api/query", "/api/groups", "/api/repeatability")}
ADDED["/api/region"] = {"where", "box", "mask"}

constants = st.one_of(
    st.integers(), st.integers(-3, 30), st.floats(), st.booleans(), st.text(max_size=8), st.sampled_from(["a", HOSTILE])
).map(repr)
terms = st.one_of(st.sampled_from(["id", "artist", "year", *COLUMNS]), constants)
numbers = st.recursive(
    terms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(" ".join),
        inner.map(lambda one: f"-({one})"),
    ),
    max_leaves=4,
)
compared = st.one_of(
    st.tuples(
        st.sampled_from(["id", "year", *(name for name, values in COLUMNS.items() if values.dtype.kind in "iuf")]),
        st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
        st.one_of(st.integers(-3, 2010).map(str), st.floats(-1, 30).map(str)),
    ).map(" ".join),
    st.tuples(
        st.sampled_from(["artist", "text"]), st.sampled_from(["==", "!=", "<"]), st.text(max_size=3).map(repr)
    ).map(" ".join),
    st.tuples(numbers, st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in", "not in"]), numbers).map(" ".join),
    st.tuples(terms, st.lists(constants, max_size=5)).map(lambda pair: f"{pair[0]} in [{', '.join(pair[1])}]"),
)
expressions = st.recursive(
    compared,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or", "==", "<"]), inner).map(lambda three: f"({' '.join(three)})"),
        inner.map(lambda one: f"not {one}"),
    ),
    max_leaves=5,
)
"""Mostly of a kind that could be meant."""


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A file that holds a picture, or held one."""
    shape = draw(st.sampled_from([(8, 8), (8, 8, 3), (8, 8, 4), (1, 1), (1, 300), (90, 7, 3)]))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, draw(st.sampled_from(["PNG", "GIF", "BMP", "TIFF", "WEBP"])))
    content = bytearray(file.getvalue())
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([None, None, None, len(content) // 2]))])


NAMED: dict[str, st.SearchStrategy[Any]] = {
    "source": st.sampled_from(["queries", "training"]),
    "ids": st.lists(st.integers(0, QUERIES).map(str), min_size=1, max_size=3),
    "id": st.integers(0, QUERIES).map(str),
    "sample": st.integers(0, SAMPLES).map(str),
    "index": st.sampled_from(INDEXES),
    "indexes": st.lists(st.sampled_from(INDEXES), min_size=1, max_size=3),
    "column": st.sampled_from(["artist", "year", *COLUMNS]),
    "k": st.integers(0, 30),
    "box": st.one_of(st.just([1, 0, 6, 8]), st.lists(st.integers(-1, 9), min_size=4, max_size=4)),
    "mask": st.one_of(st.none(), pictures().map(lambda picture: base64.b64encode(picture).decode())),
    "where": st.one_of(st.none(), expressions),
}


def tell_slow(path: str, took: float, body: Any) -> None:
    """Print what took longer than a client waits."""
    if took > LONGEST_S:
        tqdm.write(f"{took:.1f} s: {path} {body}")


def ask_all(operation: Any, mode: GenerationMode, examples: int, told: list[tuple[int, float]]) -> None:
    """Of one route, so many made-up requests; status and seconds of each answer."""

    @given(operation.as_strategy(generation_mode=mode), st.booleans(), st.data())
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    def ask(case: Any, right: bool, data: st.DataObject) -> None:
        body = case.body
        if right and isinstance(body, dict):
            left, out = data.draw(st.permutations(["box", "mask"]))  # of the two a region has one
            lacks = {"where", left} & ADDED.get(operation.path, set())
            body = {name: value for name, value in body.items() if name != out}
            known = sorted(NAMED.keys() & (body.keys() | lacks))
            case.body = body | {name: data.draw(NAMED[name], label=name) for name in known}
        started = time.perf_counter()
        response = case.call()
        took = time.perf_counter() - started
        told.append((response.status_code, took))
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
        tell_slow(operation.path, took, case.body)

    ask()


def upload_all(url: str, examples: int, told: list[tuple[int, float]]) -> None:
    """So many pictures, some of them damaged, and what is asked about them."""

    @given(pictures(), st.fixed_dictionaries({}, optional={"k": NAMED["k"].map(str), "where": expressions}))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    def ask(picture: bytes, fields: dict[str, str]) -> None:
        started = time.perf_counter()
        response = httpx2.post(f"{url}/api/upload", files={"file": ("a", picture)}, data=fields, timeout=60)
        took = time.perf_counter() - started
        told.append((response.status_code, took))
        assert response.status_code in (200, 413, 422), response.text
        tell_slow("/api/upload", took, fields)

    ask()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="for each route, of either kind")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, running(create_app(build(Path(folder), COLUMNS))) as url:
        for path, body in WARM.items():  # the first answers wait for imports and compiled passes
            httpx2.post(f"{url}{path}", json=body, timeout=60).raise_for_status()
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for found in tqdm(list(schema.get_all_operations()), unit="route"):
            assert isinstance(found, Ok)
            operation = found.ok()
            told: list[tuple[int, float]] = []
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                if mode is GenerationMode.POSITIVE or operation.body or operation.query:
                    ask_all(operation, mode, options.examples, told)
            if operation.path == "/api/upload":
                upload_all(url, options.examples, told)
            counts = Counter(status for status, _ in told)
            statuses = ", ".join(f"{many:,} x {status}" for status, many in sorted(counts.items()))
            times = [took for _, took in told]
            rows.append(f"| {operation.label} | {statuses} | {1e3 * np.median(times):.0f} | {1e3 * max(times):.0f} |")
    print(f"{cpu_name()}\n\n| route | answers | median, ms | longest, ms |\n| --- | --- | --- | --- |", *rows, sep="\n")


if __name__ == "__main__":
    main()
