"""The service under load, with and without batching: python -m benchmarks.serving [--clients C] [--seconds S]

An index of random directions of 2048 entries is served by `retrac_scale.serve` in a process of its own. Clients ask for
the top 10 of both sides of a stored query, chosen at random, one after another without a pause. Reported: errors, rate,
latency, and the server's own memory (resident less shared, since the index is mapped from files) over the run, its
first tenth left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import uvicorn

import retrac_scale as rs
from benchmarks.scanning import asked, prepare
from retrac_scale.report import Pictures
from retrac_scale.serve import Limits, create_app
from retrac_scale.serve.library import Library

QUERIES = 256
PICTURES = 1024


class Few:
    """The same few pictures for many samples."""

    def __init__(self, n: int) -> None:
        self.images = np.random.default_rng(0).integers(0, 255, (PICTURES, 32, 32, 3), dtype=np.uint8)
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> Any:
        return self.images[row % PICTURES]


def serve(port: int, folder: Path, batch: int) -> None:
    """The server's process."""
    index = rs.open_index(folder / "index")
    pictures = Pictures(Few(index.shape[1]), index.ids, Few(QUERIES))  # type: ignore[arg-type]
    library = Library({"ReTrac": index}, pictures, queries=asked(QUERIES))
    uvicorn.run(create_app(library, limits=Limits(batch=batch)), port=port, log_level="error")


async def client(url: str, until: float, seed: int, times: list[float], errors: list[str]) -> None:
    """One client, asking until it is time."""
    rng = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
        while time.monotonic() < until:
            ask = {"source": "queries", "ids": [str(rng.randrange(QUERIES))], "k": 10}
            started = time.monotonic()
            try:
                response = await http.post("/api/query", json=ask)
                if response.status_code != 200 or len(response.json()["queries"]) != 1:
                    errors.append(f"{response.status_code}: {response.text[:200]}")
            except httpx2.HTTPError as error:
                errors.append(repr(error))
            times.append(time.monotonic() - started)


@contextmanager
def running(serving: Callable[..., None], *arguments: Any) -> Iterator[tuple[str, int]]:
    """A server that answers: its address and process id. Its process serves at a port, by the rest of the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serving, args=(port, *arguments))
    process.start()
    url = f"http://127.0.0.1:{port}"
    while process.is_alive():
        try:
            httpx2.get(f"{url}/health")
            break
        except httpx2.TransportError:
            time.sleep(0.05)
    try:
        yield url, int(process.pid or 0)
    finally:
        process.terminate()
        process.join()


def load(folder: Path, clients: int, seconds: float, batch: int) -> dict[str, Any]:
    """One run."""
    with running(serve, folder, batch) as (url, pid):
        httpx2.post(f"{url}/api/query", json={"source": "queries", "ids": ["0"]}, timeout=120)  # maps the index
        memory: list[float] = []
        done = threading.Event()

        def watch() -> None:
            server = psutil.Process(pid)
            while not done.wait(max(0.1, seconds / 100)):
                info = server.memory_info()
                memory.append((info.rss - info.shared) / 2**20)

        watcher = threading.Thread(target=watch)
        watcher.start()
        times: list[float] = []
        errors: list[str] = []
        started = time.monotonic()

        async def all_clients() -> None:
            until = started + seconds
            await asyncio.gather(*(client(url, until, seed, times, errors) for seed in range(clients)))

        asyncio.run(all_clients())
        elapsed = time.monotonic() - started
        done.set()
        watcher.join()
    settled = memory[len(memory) // 10 :]
    return {
        "batch": batch,
        "requests": len(times),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "per_second": round(len(times) / elapsed, 1),
        "p50_ms": round(1e3 * float(np.quantile(times, 0.5))),
        "p99_ms": round(1e3 * float(np.quantile(times, 0.99))),
        "own_memory_mib": {"early": round(settled[0]), "late": round(settled[-1]), "largest": round(max(settled))},
    }


def main() -> None:
    """Both runs, and how many times faster the batched one is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of the batched run (default: 60)")
    parser.add_argument("--unbatched-seconds", type=float, default=20, help="of the run without batching (default: 20)")
    parser.add_argument("--folder", help="where the index is kept; default: a temporary folder")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, arguments.rows)
        alone = load(folder, arguments.clients, arguments.unbatched_seconds, 1)
        batched = load(folder, arguments.clients, arguments.seconds, 64)
    speed = batched["per_second"] / alone["per_second"]
    setting = {name: getattr(arguments, name) for name in ("rows", "clients", "seconds")} | {"cores": os.cpu_count()}
    results = {"setting": setting, "batched": batched, "unbatched": alone, "times_faster": round(speed, 1)}
    print(json.dumps(results, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
