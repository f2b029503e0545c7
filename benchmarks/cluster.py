"""What a cluster costs and brings: python -m benchmarks.cluster scaling | overhead | kills | dying | memory | plan"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import torch
from distributed import Client, LocalCluster, get_task_stream

import retrac_scale as rs
import retrac_scale.index.build
from benchmarks.scaling import make_index
from benchmarks.scanning import asked, median
from retrac_scale import planner
from retrac_scale.api.index import build_index
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import Task
from retrac_scale.store import Layout, write_store
from retrac_scale.store.schema import choose_layout
from tests.torture import contents

DIM = 4096
BATCH = 32
QUERIES = 64
AFTER = {
    "": [0, 0.25, 0.5, 1, 2, 4],
    "sketch": [0, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 25],
    "index": [0, 0.1, 0.3],
    "ridge": [0, 0.1, 0.3, 0.6],
    "query": [0, 0.1, 0.2, 0.5],
    "self-influence": [0, 0.1],
    "retrain": [0, 1, 3],
}
INSTANTS = [f"{phase}+{wait_s}".lstrip("+") for phase, waits in AFTER.items() for wait_s in waits]
"""Forty, from a client that connects, and a model that is sent, to the last answer."""
PATIENCE_S = 60
DYING = Path(__file__).parent / "results" / "cluster-dying.md"

CALM = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__MONITOR_INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "500ms",
}
"""Dask watches itself less often, see docs/cluster.md."""


@contextmanager
def cluster(
    workers: int, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Client, psutil.Process]]:
    """A client, and the scheduler's process: everything in processes of its own, one thread per worker."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/scheduler.json"
        dask = [sys.executable, "-m", "dask"]
        quiet: dict[str, Any] = {
            "stderr": subprocess.DEVNULL,
            "env": {**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        }
        scheduler = subprocess.Popen(
            [*dask, "scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", file], **quiet
        )
        hands = [
            subprocess.Popen([*dask, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard"], **quiet)
            for _ in range(workers)
        ]
        try:
            while not Path(file).exists():
                time.sleep(0.1)
            with Client(scheduler_file=file) as client:
                client.wait_for_workers(workers)
                yield client, psutil.Process(scheduler.pid)
        finally:
            for process in (*hands, scheduler):
                process.terminate()
            for process in (*hands, scheduler):
                process.wait()


def sketch(out: Path, samples: int, block: int | None, client: Client | None = None, images: Any = None) -> float:
    """Seconds to sketch U-small at one timestep per sample."""
    from diffusers import DDPMScheduler

    from benchmarks.models import build  # here: a client that only scans has no need of models

    model = build("u-small")
    if images is None:
        images = torch.rand((samples, 1, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    started = time.perf_counter()
    rs.sketch(
        rs.DiffusionTask(model, DDPMScheduler()),
        images,
        out,
        checkpoints={"c": model.state_dict()},
        timesteps=rs.EvenlySpaced(1),
        projection=rs.LowRank(dim=DIM),
        batch_size=BATCH,
        layout=None if block is None else Layout(block),
        client=client,
        progress=False,
    )
    return time.perf_counter() - started


def scaling(samples: int, rows: int, rounds: int = 3, repeats: int = 3) -> None:
    """Sketching and scanning by 1 and 2 worker processes against this one, in turns; medians of the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_index(folder / "i", rows)
        index, queries, block = rs.open_index(folder / "i"), asked(QUERIES), samples // 32
        sketching, scanning, busy = (defaultdict[str, list[float]](list) for _ in range(3))

        def scan(client: Client | None) -> float:
            return median(lambda: index.query(queries, 10, client=client), repeats)

        for number in range(rounds):
            at = folder / str(number)
            sketching["in-process"].append(sketch(at / "0", samples, block))
            scanning["in-process"].append(scan(None))
            for who, workers, settings in (
                ("1 worker", 1, CALM),
                ("2 workers", 2, CALM),
                ("2 workers under Dask's own settings", 2, {}),
            ):
                with cluster(workers, settings) as (client, _):
                    sketch(at / f"warm {who}", 64 * workers, 64, client)
                    with get_task_stream(client) as stream:
                        took = sketch(at / who, samples, block, client)
                    work = sum(part["stop"] - part["start"] for task in stream.data for part in task["startstops"])
                    sketching[who].append(took)
                    busy[who].append(work / workers / took)
                    scanning[who].append(scan(client))
                assert contents(at / who) == contents(at / "0"), "the stores differ"
            # the most that this machine could give: two plain processes, with half of the samples or a scan each
            with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                wait([pool.submit(sketch, at / f"{i}-warm", 64, 64) for i in range(2)])
                started = time.perf_counter()
                wait([pool.submit(sketch, at / f"{i}-plain", samples // 2, block) for i in range(2)])
                sketching["2 plain processes"].append(time.perf_counter() - started)
                scans = [pool.submit(scan_alone, folder / "i", repeats) for _ in range(2)]
                scanning["2 plain processes"].append(statistics.mean(job.result() for job in scans) / 2)
            shutil.rmtree(at)
        for who, took in sketching.items():
            times, one = [[statistics.median(x[name]) for x in (sketching, scanning)] for name in (who, "1 worker")]
            share = f" (at work {statistics.median(busy[who]):.1%} of the time)" if who in busy else ""
            each = ", ".join(f"{a / b:.2f}" for a, b in zip(sketching["1 worker"], took, strict=True))
            print(
                f"{who}: sketching {samples / times[0]:.0f} pairs/s, x {one[0] / times[0]:.2f} of one worker ({each})"
                f"{share}; scanning {rows} rows x {QUERIES} queries {times[1]:.2f} s, x {one[1] / times[1]:.2f}"
            )


def scan_alone(folder: Path, repeats: int) -> float:
    """Seconds of a scan in this process."""
    index, queries = rs.open_index(folder), asked(QUERIES)
    return median(lambda: index.query(queries, 10), repeats)


def overhead(tasks: int) -> None:
    """Dask's time per task over a plain loop, as a share of a block of the default size."""
    with tempfile.TemporaryDirectory() as name:
        took = sketch(Path(name) / "s", 256, None) / 256
    block = choose_layout("", 10**6, DIM).block_samples
    started = time.perf_counter()
    for _ in range(tasks):
        nothing(None, 0)
    plain = time.perf_counter() - started
    with cluster(1) as (client, _):
        started = time.perf_counter()
        for _ in run(nothing, (Task(f"nothing-{i}", (i,)) for i in range(tasks)), client):
            pass
        dask = time.perf_counter() - started
    per_task = (dask - plain) / tasks
    print(
        f"{1e3 * per_task:.1f} ms per task over a plain loop; a default block of U-small ({block} pairs) "
        f"takes {block * took:.1f} s: overhead {100 * per_task / (block * took):.3f} %"
    )


def nothing(_: Any, number: int) -> int:
    """A task without work."""
    return number


class Logged:
    """Random images that write down which were read by workers."""

    def __init__(self, samples: int, log: Path) -> None:
        self.images = torch.rand((samples, 1, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.log, self.caller = log, os.getpid()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        if os.getpid() != self.caller:
            with self.log.open("a") as file:
                file.write(f"{row}\n")
        return self.images[row]


def kills(samples: int, count: int) -> None:
    """Workers killed at random during a run: the same store, and how much was computed twice."""
    block, rng = 32, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, cluster(2) as (client, _):
        folder = Path(name)
        sketch(folder / "warm", 4 * block, block, client)
        plain = sketch(folder / "whole", samples, block, client)
        dataset = Logged(samples, folder / "log")
        done = threading.Event()
        killed = 0

        def kill() -> None:
            nonlocal killed
            while killed < count and not done.wait(float(rng.uniform(0.5, 1.5)) * plain / (count + 1)):
                pids = list(client.run(os.getpid, on_error="ignore").values())
                if pids:
                    os.kill(int(rng.choice(pids)), signal.SIGKILL)
                    killed += 1

        killer = threading.Thread(target=kill)
        killer.start()
        took = sketch(folder / "s", samples, block, client, dataset)
        done.set()
        killer.join()
        first = [int(row) for row in (folder / "log").read_text().split() if int(row) % block == 0]
        same = contents(folder / "s") == contents(folder / "whole")
        print(
            f"{killed} kills: store {'identical' if same else 'DIFFERENT'}; {len(first)} blocks begun for "
            f"{-(-samples // block)}, none more than {max(first.count(row) for row in set(first))} times; "
            f"{took:.1f} s instead of {plain:.1f} s: {(took - plain) / max(1, killed):.1f} s lost per kill"
        )


class Walk:
    """All that workers are asked for, one after the other, on some digits; other threads may ask how far it is.

    Its phases are connect, sketch, index, ridge, query, self-influence and retrain.
    """

    def __init__(self, folder: Path, digits: int) -> None:
        self.folder, self.digits, self.entered = folder, digits, threading.Condition()
        self.begun: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """A phase begins."""
        with self.entered:
            self.begun[phase] = time.monotonic()
            self.entered.notify_all()

    def where(self) -> str:
        """The phase, and how many blocks of the store are committed while it is being filled."""
        phase = list(self.begun)[-1]
        if phase == "sketch":
            with suppress(FileNotFoundError, ValueError):
                done = rs.open_store(self.folder / "s").committed("c")
                return f"{phase}, {done.sum()} of {len(done)} blocks committed"
        return phase

    def run(self, client: Client | None) -> dict[str, Any]:
        """The files of the store and of both indexes, and the answers."""
        from diffusers import DDPMScheduler
        from sklearn.datasets import load_digits

        from benchmarks.models import build

        folder, model = self.folder, build("u-small")
        self.enter("sketch")
        store = rs.sketch(
            rs.DiffusionTask(model, DDPMScheduler()),
            torch.from_numpy(np.kron(load_digits().images[: self.digits], np.ones((2, 2)))).float().unsqueeze(1) / 8
            - 1,
            folder / "s",
            checkpoints={"c": model.state_dict()},
            timesteps=rs.Explicit([200, 500, 800]),
            projection=rs.LowRank(dim=1024),
            batch_size=BATCH,
            layout=Layout(25),
            client=client,
            progress=False,
        )
        self.enter("index")
        index = build_index(store, rs.ReTrac(), folder / "i", client=client)
        self.enter("ridge")
        ridge = build_index(store, rs.TRAK(damping=0.1), folder / "r", client=client)
        self.enter("query")
        queries = rs.take(store, [3, 20, 77])
        tops = [each.query(queries, 10, client=client) for each in (index, ridge) * 10]
        self.enter("self-influence")
        own = rs.self_influence(store, rs.ReTrac(), client=client)
        self.enter("retrain")
        subsets = np.random.default_rng(0).permuted(np.tile(np.arange(100), (20, 1)), axis=1)[:, :50]
        losses = rs.evaluate.retrain(
            list(subsets), slow_mean, losses_of_mean, folder / "l", client=client, progress=False
        )
        self.enter("end")
        found = {name: contents(folder / name) for name in "sir"}
        return found | {"answers": [(top.ids.tobytes(), top.scores.tobytes()) for top in tops], "own": [own, losses]}


def slow_mean(ids: Any, seed: int) -> float:
    """A model that takes 0.2 s to train."""
    time.sleep(0.2)
    return float(np.mean(ids) + seed)


def losses_of_mean(model: float) -> Any:
    """Losses of two queries."""
    return np.array([0.0, 100.0]) - model


def workers_here() -> LocalCluster:
    """Two worker processes, and the scheduler in this one."""
    return LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)


def digest(found: dict[str, Any]) -> dict[str, bytes]:
    """A digest of each part of what a walk found."""
    return {name: hashlib.sha256(pickle.dumps(part)).digest() for name, part in found.items()}


def dying(digits: int, cases: list[tuple[str, int, int]], longest_s: float, out: Path) -> None:
    """Workers killed at chosen instants, one or both, alone or beside busy processes: the same store and answers.

    Args:
        digits: in the store.
        cases: instant, workers killed, busy processes beside.
        longest_s: after which a walk counts as hanging.
        out: the table, to which lines are added; cases that stand in it are not run again.
    """
    if not out.exists():
        out.write_text(
            f"# Workers that die\n\n    python -m benchmarks.cluster dying --digits {digits}\n\n"
            f"Begun {time.strftime('%Y-%m-%d')} on {os.cpu_count()} cores, load {os.getloadavg()[2]:.0f} beside. "
            "Outcome: files of store and indexes, and answers, against those of one process.\n\n"
            "| killed at | in | workers killed of 2 | busy processes | took | outcome |\n|" + " --- |" * 6 + "\n"
        )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines()]
    known = {(row[0], row[2], row[3]) for row in rows if len(row) == 6}
    with tempfile.TemporaryDirectory() as name, ExitStack() as others:
        cluster = others.enter_context(workers_here())
        folder = Path(name) / "walk"  # the same for all: an index knows the path of its store
        expected = digest(Walk(folder, digits).run(None))
        for instant, killed, busy in cases:
            if (f"{instant} s", str(killed), str(busy)) in known:
                continue
            shutil.rmtree(folder)
            cluster.scale(2)  # those that it gave up
            try:
                cluster.wait_for_workers(2, timeout=PATIENCE_S)
            except TimeoutError:  # a nanny that does not come back, by whatever it was held up
                cluster.close()
                cluster = others.enter_context(workers_here())
            work = [sys.executable, "-c", "while True: pass"]
            hands = [subprocess.Popen(work, start_new_session=True) for _ in range(busy)]  # somebody else's programs
            where, took, found = killed_walk(Walk(folder, digits), cluster, instant, killed, longest_s)
            for hand in hands:
                hand.kill()
            if isinstance(found, dict):
                found = "same" if found == expected else "DIFFERENT"
            row = f"| {instant} s | {where} | {killed} | {busy} | {took:.0f} s | {found!s:.200} |"
            print(row, flush=True)
            with out.open("a") as file:
                file.write(row + "\n")
            if found is None:
                raise SystemExit("it hangs")


def killed_walk(
    walk: Walk, cluster: LocalCluster, instant: str, victims: int, longest_s: float
) -> tuple[str, float, Any]:
    """Where a walk was when workers were killed, how long it took, and what it found: an exception, or None as yet."""
    phase, _, wait_s = instant.rpartition("+")
    found: list[Any] = []

    def go() -> None:
        try:
            with Client(cluster) as client:
                found.append(digest(walk.run(client)))
        except Exception as error:
            traceback.print_exc()
            found.append(error)

    walk.enter("connect")
    walker = threading.Thread(target=go, daemon=True)
    walker.start()
    with walk.entered:
        walk.entered.wait_for(lambda: (phase or "connect") in walk.begun, longest_s)
    time.sleep(float(wait_s))
    where = walk.where()
    for nanny in list(cluster.workers.values())[:victims]:
        with suppress(ProcessLookupError, TypeError):
            os.kill(nanny.pid, signal.SIGKILL)
    walker.join(longest_s)
    return where, time.monotonic() - walk.begun["connect"], found[0] if found else None


def many_chunks(folder: Path, chunks: int) -> None:
    """An index of chunks of 64 rows of 64 bytes, as small as they get."""
    width = retrac_scale.index.build.MIN_CHUNK_SAMPLES
    retrac_scale.index.build.CHUNK_BYTES = width * width
    rows = np.random.default_rng(0).standard_normal((chunks * width, 1, width), np.float32)
    index = build_index(write_store(folder / "rows", {"c": rows}), rs.ReTrac(), folder / "i")
    assert len(index.chunks) == chunks


def memory(tasks: int, chunks: int = 20_000) -> None:
    """Memory of client and scheduler over many tasks, and over the scan of an index of many chunks with 64 queries."""
    with tempfile.TemporaryDirectory() as name, cluster(2) as (client, scheduler):
        here = psutil.Process()

        def report(what: str) -> None:
            used = [process.memory_info().rss / 1e6 for process in (here, scheduler)]
            print(f"{what}: client {used[0]:.0f} MB, scheduler {used[1]:.0f} MB", flush=True)

        report("before")
        for done, _ in enumerate(run(nothing, (Task(f"sketch-c-samples-{i}", (i,)) for i in range(tasks)), client)):
            if done and done % (tasks // 4) == 0:
                report(f"{done} tasks done")
        report(f"{tasks} tasks done")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # another process, so that this one only asks
            pool.submit(many_chunks, Path(name), chunks).result()
        index = rs.open_index(Path(name) / "i")
        rows = np.random.default_rng(1).standard_normal((QUERIES, 1, index.shape[2]), np.float32)
        queries = write_store(None, {"c": rows})
        report(f"index of {len(index.chunks)} chunks opened")
        for number in range(3):
            index.query(queries, 10, client=client)
            report(f"its scan {number + 1} with {QUERIES} queries done")


def plan(samples: int, pairs_per_s: float, workers: int) -> None:
    """Blocks, tasks per second, requests and bytes of a run, from the planner; pairs_per_s is one worker's rate."""
    for where in ("disk", "s3://bucket/store"):
        size = planner.store_size(samples, 1, 4, DIM, out="" if where == "disk" else where)
        seconds = 4 * samples / pairs_per_s / workers
        rate = size.blocks / seconds
        print(
            f"{samples:,} samples x 4 checkpoints on {where}: {size.blocks:,} blocks, {size.array_bytes / 1e12:.1f} TB "
            f"in {size.files:,} objects; {workers} workers at {pairs_per_s:g} pairs/s: {seconds / 86400:.1f} days, "
            f"{rate:.2f} tasks/s at the scheduler, {size.files / seconds:.1f} writes/s, "
            f"{size.array_bytes / seconds / 1e6:.1f} MB/s; index {planner.index_bytes(samples, 4, DIM) / 1e12:.1f} TB"
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("scaling", "overhead", "kills", "dying", "memory", "plan"))
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rate", type=float, default=200.0, help="pairs per second of one worker")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--digits", type=int, default=500, help="at least 78")
    parser.add_argument("--instants", nargs="+", default=INSTANTS, help="seconds from the start, or PHASE+seconds")
    parser.add_argument("--victims", nargs="+", type=int, default=[1, 2], help="of two workers")
    parser.add_argument("--companions", nargs="+", type=int, default=[0, 2], help="busy processes beside")
    parser.add_argument("--once", action="store_true", help="each instant once, with victims and companions in turn")
    parser.add_argument("--out", type=Path, default=DYING)
    parser.add_argument("--longest", type=float, default=600.0, help="seconds after which a run counts as hanging")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "scaling":
        scaling(options.samples, options.rows)
    elif options.what == "overhead":
        overhead(min(options.tasks, 2000))
    elif options.what == "kills":
        kills(options.samples, options.kills)
    elif options.what == "dying":
        ways = list(itertools.product(options.victims, options.companions))
        pairs = zip(options.instants, itertools.cycle(ways), strict=False)
        every = pairs if options.once else itertools.product(options.instants, ways)
        dying(options.digits, [(instant, *way) for instant, way in every], options.longest, options.out)
    elif options.what == "memory":
        memory(options.tasks)
    else:
        for samples in (10**6, 10**9):
            plan(samples, options.rate, options.workers)


if __name__ == "__main__":
    main()
