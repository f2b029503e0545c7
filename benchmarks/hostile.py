"""A service that is asked badly: python -m benchmarks.hostile [--rows N] [--seconds S]

Random rows of 512 entries with columns, of `benchmarks.millions`, are indexed and served by `retrac-scale serve`.
Measured beside what clients see who ask plainly: eight clients with a filter each, of their own; the dearest filter
that is accepted, and what it costs others once its client is gone; and honest clients while one in ten sends what is
refused, malformed, huge, or given up. Printed: how long the service takes to start, its memory then (resident, maps of
files included) and how long the first answer takes; of each run the median and 99th percentile of the honest, and how
many answers were wrong: not 200 for the honest, 500 or above for the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from benchmarks import millions
from benchmarks.measurement_page import cpu_name

DIM, QUERIES = 512, 64
REFUSED = (
    {"ids": ["no such query"]},
    {"where": "artist ="},
    {"where": "secret == 1"},
    {"where": " or ".join(["artist in artist"] * 99)},
    {"where": "__import__('os').system('true')"},
    {"k": 10**9},
    {"ids": [str(n) for n in range(65)]},
)
GIVEN_UP_S = 0.05
"""How long a client waits who goes away."""

Asking = Callable[[httpx2.AsyncClient, random.Random], Awaitable[httpx2.Response | None]]


@contextmanager
def served(folder: Path, rows: int) -> Iterator[str]:
    """The address of the service of an index, which tells how it started."""
    millions.asked(QUERIES, DIM, folder / "queries")
    named: list[Path | str] = ["serve", folder / "index", "--queries", folder / "queries", "--port", "0", "--json"]
    for option, count in (("--images", rows), ("--query-images", QUERIES)):
        np.save(folder / f"{count}.npy", np.zeros((count, 2, 2), np.uint8))
        named += [option, folder / f"{count}.npy"]
    command = [sys.executable, "-m", "retrac_scale.cli", *named]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            httpx2.get(f"{url}health").raise_for_status()
            started, memory = time.monotonic() - begun, psutil.Process(process.pid).memory_info().rss / 1e6
            httpx2.post(f"{url}api/query", json={"source": "queries", "ids": ["0"]}, timeout=120).raise_for_status()
            first = time.monotonic() - begun - started
            print(f"started in {started:.1f} s, {memory:.0f} MB; the first answer after {first:.1f} s more\n")
            yield url
        finally:
            process.terminate()


def query(where: str | None = None, **changed: Any) -> Asking:
    """Ask for a stored query, chosen at random, with a filter."""

    async def ask(http: httpx2.AsyncClient, rng: random.Random) -> httpx2.Response:
        body = {"source": "queries", "ids": [str(rng.randrange(QUERIES))], "k": 10, "where": where, **changed}
        return await http.post("/api/query", json={key: value for key, value in body.items() if value is not None})

    return ask


async def given_up(http: httpx2.AsyncClient, rng: random.Random) -> httpx2.Response | None:
    """The dearest filter, of a client who goes away."""
    try:
        return await asyncio.wait_for(query(millions.WORST)(http, rng), GIVEN_UP_S)
    except TimeoutError:
        return None


async def hostile(http: httpx2.AsyncClient, rng: random.Random) -> httpx2.Response | None:
    """Something that no honest client sends."""
    what = rng.randrange(len(REFUSED) + 4)
    if what < len(REFUSED):
        return await query(**REFUSED[what])(http, rng)
    if what == len(REFUSED):
        return await http.post("/api/query", content=b"{" * 1000, headers={"content-type": "application/json"})
    if what == len(REFUSED) + 1:
        return await http.post("/api/query", content=b"0" * 2**20)
    if what == len(REFUSED) + 2:
        return await http.post("/api/upload", files={"file": ("x.png", b"\x89PNG" + bytes(100))})
    return await given_up(http, rng)


async def client(
    url: str, until: float, seed: int, asks: Asking, told: list[tuple[float, int]], every: float = 0
) -> None:
    """One client, asking until it is time: how long each answer took, and its status."""
    rng = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
        while time.monotonic() < until:
            started = time.monotonic()
            response = await asks(http, rng)
            if response is not None:
                told.append((time.monotonic() - started, response.status_code))
            await asyncio.sleep(every)


def together(url: str, seconds: float, honest: list[Asking], others: list[Asking]) -> tuple[list[float], int]:
    """Seconds of every answer to the honest, and how many answers were 500 or above, or refused an honest client."""
    good: list[tuple[float, int]] = []
    bad: list[tuple[float, int]] = []

    async def all_clients() -> None:
        until = time.monotonic() + seconds
        mine = [client(url, until, seed, ask, good) for seed, ask in enumerate(honest)]
        theirs = [client(url, until, 10**6 + seed, ask, bad, 0.01) for seed, ask in enumerate(others)]
        await asyncio.gather(*mine, *theirs)

    asyncio.run(all_clients())
    wrong = sum(status != 200 for _, status in good) + sum(status >= 500 for _, status in bad)
    return [took for took, _ in good], wrong


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=20, help="of each run; of many clients, three times as many")
    parser.add_argument("--clients", type=int, default=64, help="of the last two")
    options = parser.parse_args()
    wheres = [f"year < {1930 + 5 * n} and artist != 'artist {n}' or rating > {n / 2}" for n in range(8)]
    few = max(1, options.clients // 10)
    runs: dict[str, tuple[list[Asking], list[Asking]]] = {
        "1 client": ([query()], []),
        "8 clients": ([query()] * 8, []),
        "8 clients, a filter each": ([query(where) for where in wheres], []),
        "1 client with the dearest filter": ([query(millions.WORST)], []),
        "1 client beside one who gives up the dearest filter": ([query()], [given_up]),
        f"{options.clients - few} clients": ([query()] * (options.clients - few), []),
        f"{options.clients - few} clients beside {few} hostile ones": (
            [query()] * (options.clients - few),
            [hostile] * few,
        ),
    }
    print(
        f"{options.rows:,} rows of {DIM} entries; {cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        millions.write(folder, options.rows, DIM)
        with served(folder, options.rows) as url:
            print("| run | answers | median, ms | 99 %, ms | wrong |\n" + "| --- " * 5 + "|")
            for what, (honest, others) in runs.items():
                seconds = options.seconds * (3 if len(honest) > len(wheres) else 1)
                took, wrong = together(url, seconds, honest, others)
                middle, late = 1000 * np.quantile(took, [0.5, 0.99])
                print(f"| {what} | {len(took)} | {middle:.0f} | {late:.0f} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
