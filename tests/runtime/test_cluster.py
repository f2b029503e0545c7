"""Worker processes: the same store, index and answers as in one process, whatever dies or fails on the way."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster
from threadpoolctl import threadpool_info

import retrac_scale as rs
from retrac_scale.runtime.graphs import compute, constant, delayed
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import GIVE_UP, Task
from retrac_scale.runtime.workers import gpu_label
from retrac_scale.store import Layout
from tests.conftest import tiny_unet
from tests.torture import contents

SCHEDULER = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
BLOCK, N = 4, 40


class Logged:
    """Images that write down who reads them, and of which some cannot be read or end their reader, once."""

    def __init__(self, log: Path, bad: tuple[int, ...] = (), deadly: tuple[int, ...] = ()) -> None:
        self.images = torch.from_numpy(np.random.default_rng(0).standard_normal((N, 1, 8, 8), dtype=np.float32))
        self.log, self.bad, self.deadly, self.reader = log, bad, deadly, os.getpid()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        if os.getpid() != self.reader:  # the caller looks at every item before it begins
            with self.log.open("a") as file:
                file.write(f"{row}\n")
            if row in self.bad:
                raise ValueError(f"image {row} is torn")
            died = self.log.with_suffix(f".{row}")
            if row in self.deadly and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.images[row]

    def reads(self) -> Counter[int]:
        return Counter(map(int, self.log.read_text().split()))


def sketch(dataset: Any, out: Any, client: Client | None = None) -> rs.SketchStore:
    states = {name: tiny_unet(seed).state_dict() for seed, name in enumerate("ab")}
    return rs.sketch(
        rs.DiffusionTask(tiny_unet(), SCHEDULER),
        dataset,
        out,
        checkpoints=states,
        timesteps=rs.EvenlySpaced(2),
        projection=rs.LowRank(4, 64),
        batch_size=8,
        layout=Layout(BLOCK),
        client=client,
        progress=False,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        SubprocessCluster(
            n_workers=2,
            threads_per_worker=1,
            worker_kwargs={"resources": {"GPU": 1}, "memory_limit": 0},
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, written in this process."""
    folder = tmp_path_factory.mktemp("whole")
    sketch(Logged(folder / "log"), folder / "s")
    return folder / "s"


def test_store_and_index_are_bit_identical_and_answers_equal(client: Client, whole: Path, tmp_path: Path) -> None:
    store = sketch(Logged(tmp_path / "log"), tmp_path / "s", client)
    assert contents(tmp_path / "s") == contents(whole)
    here = rs.build_index(rs.open_store(whole), rs.ReTrac(), tmp_path / "here")
    there = rs.build_index(rs.open_store(whole), rs.ReTrac(), tmp_path / "there", client=client)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    queries = rs.take(store, [3, 20])
    for asked in ({"side": "both"}, {"where": "id > 7"}, {"group_by": np.arange(N) % 5}):
        one, two = here.query(queries, 4, **asked), there.query(queries, 4, client=client, **asked)
        np.testing.assert_array_equal(one.ids, two.ids)
        rounding = 1e-6 if "group_by" in asked else 0  # sums of float32 products, whose order is BLAS's own
        np.testing.assert_allclose(one.scores, two.scores, rtol=rounding, atol=0)
    np.testing.assert_array_equal(
        rs.self_influence(store, rs.ReTrac(), client=client), rs.self_influence(store, rs.ReTrac())
    )
    trak = rs.build_index(store, rs.TRAK(damping=0.1), tmp_path / "trak", client=client)
    assert trak.query(queries, 4, client=client).ids.shape == (2, 4)
    assert not client.run_on_scheduler(lambda: "torch" in sys.modules), "tasks made the scheduler import torch"


def test_workers_keep_neither_model_nor_sketcher_of_a_run_that_ended(client: Client, tmp_path: Path) -> None:
    def held() -> int:
        gc.collect()
        return sum(isinstance(one, (torch.nn.Module, rs.GradientSketcher)) for one in gc.get_objects())

    client.wait_for_workers(2)
    before = client.run(held)
    sketch(Logged(tmp_path / "log"), tmp_path / "s", client)
    for _ in range(100):  # workers are told a moment later
        if (after := client.run(held)) == before:
            break
        time.sleep(0.1)
    assert after == before


@pytest.mark.slow
def test_after_workers_were_killed_the_store_is_the_same_and_no_block_ran_more_often(
    client: Client, whole: Path, tmp_path: Path
) -> None:
    deadly = (5, 21)
    dataset = Logged(tmp_path / "log", deadly=deadly)
    sketch(dataset, tmp_path / "s", client)
    assert contents(tmp_path / "s") == contents(whole)
    surplus = sum(dataset.reads()[block] - 2 for block in range(0, N, BLOCK))  # two checkpoints read each block once
    # a kill takes the block along that was being computed, and if no worker is left the other's
    assert len(deadly) <= surplus <= 2 * len(deadly)


def test_what_a_task_does_to_what_is_shared_stays_on_its_worker(client: Client) -> None:
    client.wait_for_workers(2)

    def visit(visitors: list[int]) -> tuple[int, set[int]]:
        before = set(visitors)
        visitors.append(os.getpid())
        time.sleep(0.05)
        return os.getpid(), before

    found = [result for _, result in run(visit, [Task(f"visit-{i}", ()) for i in range(20)], client, shared=[])]
    assert len({here for here, _ in found}) == 2
    assert all(before <= {here} for here, before in found)


@pytest.mark.slow
def test_a_block_that_always_fails_is_named_at_the_end_and_the_next_call_does_only_the_rest(
    client: Client, whole: Path, tmp_path: Path
) -> None:
    dataset = Logged(tmp_path / "log", bad=(9,))
    with pytest.raises(rs.FailedTasksError, match="2 tasks failed, all others are done") as raised:
        sketch(dataset, tmp_path / "s", client)
    assert "sketch-a-samples-8-12: ValueError: image 9 is torn" in str(raised.value)
    assert {task.args[:2] for task, _ in raised.value.failures} == {("a", 2), ("b", 2)}
    assert rs.open_store(tmp_path / "s").committed("b").sum() == N // BLOCK - 1
    dataset.log.write_text("")
    dataset.bad = ()
    sketch(dataset, tmp_path / "s", client)
    assert dataset.reads() == dict.fromkeys(range(8, 12), 2)
    assert contents(tmp_path / "s") == contents(whole)


def test_a_worker_with_other_weights_under_the_same_name_is_refused(client: Client, tmp_path: Path) -> None:
    caller = os.getpid()

    def state() -> Any:
        return tiny_unet(int(os.getpid() != caller)).state_dict()

    with pytest.raises(rs.FailedTasksError, match="checkpoint 'c' has other weights on"):
        rs.sketch(
            rs.DiffusionTask(tiny_unet(), SCHEDULER),
            torch.zeros(2, 1, 8, 8),
            tmp_path / "s",
            checkpoints={"c": state},
            timesteps=rs.EvenlySpaced(1),
            projection=rs.LowRank(4, 64),
            client=client,
            progress=False,
        )
    assert not rs.open_store(tmp_path / "s").committed("c").any()


def test_tasks_go_to_workers_with_the_resource(client: Client) -> None:
    assert gpu_label(client) == {"GPU": 1}
    tasks = [Task(f"pid-{i}", ()) for i in range(4)]
    assert len(list(run(_pid, tasks, client, resources={"GPU": 1}))) == 4


def _pid(_: None) -> int:
    return os.getpid()


def _flaky(folder: Path, number: int) -> int:
    """Fails as object stores do, the first time."""
    mark = folder / str(number)
    if not mark.exists():
        mark.touch()
        raise TimeoutError("slow down")
    return number


@pytest.mark.parametrize("where", ["here", "there"])
def test_failures_that_may_pass_are_tried_again(where: str, client: Client, tmp_path: Path) -> None:
    tasks = [Task(f"flaky-{i}", (i,)) for i in range(5)]
    found = run(_flaky, tasks, client if where == "there" else None, shared=tmp_path)
    assert sorted(result for _, result in found) == list(range(5))


def test_calls_whose_workers_were_all_killed_finish(client: Client) -> None:  # the last: their successors import anew
    shared, numbers = np.ones(2 * 10**6), range(6)  # so large that Dask would warn
    pids, homes = client.run(os.getpid).values(), list(client.nthreads())

    def slow_sum(values: Any, number: int) -> float:  # in here: it travels by value, and no worker imports torch
        time.sleep(0.5)
        return float(values.sum() + number)

    def graph(*places: str) -> list[Any]:
        values, parts = constant(shared), []
        for number in numbers:
            with dask.annotate(workers=[places[number % 2]], allow_other_workers=True) if places else nullcontext():
                parts.append(delayed(slow_sum)(values, number))
        return compute([delayed(sum)(parts)], client)

    def many() -> list[float]:
        tasks = [Task(f"sum-{number}", (number,)) for number in numbers]
        return sorted(result for _, result in run(slow_sum, tasks, client, shared=shared))

    with ThreadPoolExecutor() as calls:
        found = [calls.submit(call) for call in (graph, partial(graph, *homes), many)]
        time.sleep(1.2)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        once, placed, single = [each.result(timeout=120) for each in found]
    assert once == placed == [6 * 2e6 + 15]
    assert single == [2e6 + number for number in numbers]


def test_when_all_fail_alike_the_rest_is_left() -> None:
    begun = []

    def fail(_: None, number: int) -> None:
        begun.append(number)
        raise ValueError("no")

    with pytest.raises(rs.FailedTasksError, match=f"the last {GIVE_UP} in a row"):
        list(run(fail, (Task(f"fail-{i}", (i,)) for i in range(1000)), threads=1))
    assert len(begun) == GIVE_UP


@pytest.mark.parametrize("threads", [1, 3])
def test_many_failures_that_may_pass_are_all_tried_again(threads: int, tmp_path: Path) -> None:
    tasks = [Task(f"flaky-{i}", (i,)) for i in range(5 * GIVE_UP)]
    found = [result for _, result in run(_flaky, tasks, shared=tmp_path, threads=threads)]
    assert sorted(found) == list(range(5 * GIVE_UP))


def test_a_disk_that_stays_broken_is_given_up_and_each_task_keeps_its_own_error() -> None:
    begun = set()

    def fail(_: None, number: int) -> None:
        begun.add(number)
        raise OSError(errno.EIO, f"no disk for {number}")

    with pytest.raises(rs.FailedTasksError, match="in a row, the rest was left") as raised:
        list(run(fail, (Task(f"fail-{i}", (i,)) for i in range(1000)), threads=1))
    assert [str(error) for _, error in raised.value.failures] == [
        f"[Errno {errno.EIO}] no disk for {task.args[0]}" for task, _ in raised.value.failures
    ]
    assert {task.args[0] for task, _ in raised.value.failures} == begun == {*range(GIVE_UP)}


def test_tasks_are_taken_no_faster_than_they_are_done() -> None:
    taken = 0

    def tasks() -> Iterator[Task]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield Task(f"wait-{number}", (number,))

    for done, _ in enumerate(run(lambda _, number: number, tasks(), threads=2)):
        assert taken - done <= 6


def test_on_threads_torch_has_one_each_and_is_set_back() -> None:
    before = torch.get_num_threads()
    seen = {(result, task.name) for task, result in run(_torch_threads, [Task("a", ()), Task("b", ())], threads=2)}
    assert seen == {(1, "a"), (1, "b")}
    assert torch.get_num_threads() == before


def test_whatever_runs_meanwhile_threads_keep_as_many_of_torch_and_blas_as_they_had() -> None:
    before, blas = torch.get_num_threads(), _blas_threads()
    torch.set_num_threads(3)

    def asks() -> list[int]:
        born = torch.get_num_threads()
        ((_, within),) = run(_torch_threads, [Task("b", ())], threads=2)
        return [born, within, *compute([delayed(_torch_threads)(None)], None), torch.get_num_threads()]

    try:
        under_way: Any = run(_torch_threads, [Task("a", ()), Task("b", ())], threads=2)
        assert next(under_way)[1] == 1
        with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as later:
            assert other.submit(asks).result() == [3, 1, 1, 3]
            assert set(_blas_threads()) <= {1}
            under_way.close()
            assert [torch.get_num_threads(), *later.submit(asks).result()] == [3, 3, 1, 1, 3]
        assert _blas_threads() == blas
    finally:
        torch.set_num_threads(before)


def _blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def _torch_threads(_: None) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("estimator", [rs.ReTrac(), rs.ReTracRidge()])
def test_relative_paths_are_the_callers_for_workers_in_another_folder(
    estimator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workers").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).standard_normal((90, 1, 16), dtype=np.float32)
    rs.write_store("s", {"a": rows})
    store, queries = rs.open_store("s"), rs.write_store(None, {"a": rows[:3]})
    here = rs.build_index(store, estimator, "here")
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        client.run(os.chdir, tmp_path / "workers")
        there = rs.build_index(store, estimator, "there", client=client)
        found = there.query(queries, 5, client=client)
        own = rs.self_influence(store, estimator, client=client)
    np.testing.assert_array_equal(found.scores, here.query(queries, 5).scores)
    np.testing.assert_array_equal(own, rs.self_influence(store, estimator))
    assert not list((tmp_path / "workers").iterdir())
