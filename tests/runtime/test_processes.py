"""Worker processes for as long as they are needed, and schedulers that are there."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
from distributed import Client, LocalCluster

from retrac_scale.runtime.processes import workers
from retrac_scale.runtime.workers import most_on_a_machine
from retrac_scale.sketching.calibration import fitting


def test_processes_are_there_inside_deaf_to_the_keyboard_and_gone_after() -> None:
    before = signal.getsignal(signal.SIGINT)
    with workers("2") as client:
        pids = set(client.run(os.getpid).values())
        assert len(pids - {os.getpid()}) == 2
        assert set(client.run(signal.getsignal, signal.SIGINT).values()) == {signal.SIG_IGN}
        assert most_on_a_machine(client) == 2
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_scheduler_that_is_there_outlives_its_use() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        with workers(cluster.scheduler_address) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        with Client(cluster) as again:
            assert again.submit(sum, [1, 2]).result() == 3


@pytest.mark.parametrize(
    ("told", "said"),
    [("0", "neither a number of processes"), ("many", "neither a number"), ("tcp://127.0.0.1:9", "no Dask scheduler")],
)
def test_what_is_no_workers_is_told(monkeypatch: pytest.MonkeyPatch, told: str, said: str) -> None:
    monkeypatch.setattr("retrac_scale.runtime.processes.CONNECT_S", 1)
    with pytest.raises(ValueError, match=said), workers(told):
        pass


def test_processes_of_one_machine_share_its_memory() -> None:
    kept = psutil.virtual_memory().total // 2**14
    alone, shared = (fitting(kept, 10**9, torch.device("cpu"), sharing) for sharing in (1, 8))
    assert 6 < alone / shared < 10  # the free memory may change between
