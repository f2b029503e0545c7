"""Processes that train together: what one of them is refused, all are, and none waits for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

import retrac_scale as rs
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

FORK: Any = multiprocessing.get_context("fork")


def refusals(work: Callable[[Path], Any], folder: Path) -> list[str]:
    """What each of two processes that train together is told."""
    told = FORK.Queue()

    def process(rank: int) -> None:
        place = f"file://{folder / 'rendezvous'}"
        wait = timedelta(seconds=20)
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=wait)
        try:
            work(folder)
        except Exception as error:
            told.put((rank, f"{type(error).__name__}: {error}"))
        else:
            told.put((rank, ""))
        distributed.destroy_process_group()

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(2)]
    for one in processes:
        one.start()
    found = dict(told.get(timeout=60) for _ in processes)
    for one in processes:
        one.join()
    return [found[rank] for rank in range(2)]


def recorder(folder: Path, **options: Any) -> rs.TrainingRecorder:
    return rs.TrainingRecorder(folder / "recorded", 4, SCHEDULER, **options)


def test_a_damaged_record_is_told_to_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded/log.jsonl").write_text("nonsense\n")
    one, other = refusals(recorder, tmp_path)
    assert one == other
    assert "ValueError: line 1 of" in one


def test_a_checkpoint_of_the_same_name_is_refused_on_all_of_them(tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        ours = recorder(folder)
        for _ in range(2):
            ours.step(np.arange(4), np.arange(4), 0, 0.1)
            ours.checkpoint("a")

    one, other = refusals(train, tmp_path)
    assert one == other
    assert "has a checkpoint 'a' already" in one


def test_a_store_that_cannot_be_written_is_told_to_all_of_them(tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        model = SmallDenoiser()
        ours = recorder(folder, sketch=rs.CountSketch(8), store=folder / "s", model=model)
        loss = model(images(4), torch.arange(4))[0].square().mean()
        ours.batch(np.arange(4), np.arange(4), 0)
        loss.backward()
        ours.update(0.1)
        (folder / "s").write_text("something else")
        ours.checkpoint("a")

    one, other = refusals(train, tmp_path)
    assert one == other
    assert "is a file; choose another path" in one
