"""Noise, timestep plans and the training record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import retrac_scale as rs
from retrac_scale.task.timesteps import grid_from_spec
from retrac_scale.training.record import TrainingRecord
from retrac_scale.training.recorded import last_seen

IDS = np.arange(5)


def test_noise_depends_on_seed_id_timestep_and_draw_and_is_standard_normal() -> None:
    def draw(sample: Any = 1, step: int = 2, seed: int = 3, number: int = 0) -> torch.Tensor:
        return rs.draw_noise((4096,), [sample], [step], seed, draw=number)[0]

    assert torch.equal(draw(), draw())
    for other in (draw(sample=2), draw(sample="1"), draw(step=3), draw(seed=4), draw(number=1)):
        assert abs(torch.corrcoef(torch.stack([draw(), other]))[0, 1]) < 5 / 4096**0.5
    assert abs(draw().mean()) < 5 / 4096**0.5
    assert abs(draw().var() - 1) < 5 * (2 / 4096) ** 0.5


def test_noise_of_ids_and_timesteps_in_tensors_is_that_of_their_numbers() -> None:
    expected = rs.draw_noise((2,), np.array([3, 5]), np.array([7, 8]), 9)
    ids, steps = torch.tensor([3, 5]), torch.tensor([7, 8])
    assert torch.equal(rs.draw_noise((2,), ids, steps, 9), expected)
    assert torch.equal(rs.draw_noise((2,), list(ids), steps, torch.tensor(9)), expected)
    assert torch.equal(rs.draw_noise((2,), ids.int(), steps.int(), torch.tensor([9, 9])), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_of_tensors_on_a_gpu_is_that_of_their_numbers() -> None:
    ids, steps = torch.tensor([3, 5]), torch.tensor([7, 8])
    assert torch.equal(rs.draw_noise((2,), ids.cuda(), steps.cuda(), 9), rs.draw_noise((2,), ids, steps, 9))


def test_common_noise_is_the_same_for_every_sample_and_no_sample_s_own() -> None:
    steps = np.array([7, 8, 7, 7])
    drawn = rs.draw_noise((3, 4096), None, steps, 5)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[3])
    assert torch.equal(rs.draw_noise((3, 4096), None, [7], [5])[0], drawn[0])
    others = [
        drawn[1],
        rs.draw_noise((3, 4096), None, [7], 6)[0],
        rs.draw_noise((3, 4096), None, [7], 5, draw=1)[0],
        *rs.draw_noise((3, 4096), [0, 1, ""], [7, 7, 7], 5),
    ]
    for other in others:
        pair = torch.stack([drawn[0].flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / (3 * 4096) ** 0.5
    assert abs(drawn.mean()) < 5 / (2 * 3 * 4096) ** 0.5


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        (rs.EvenlySpaced(1), [500]),
        (rs.EvenlySpaced(4), [125, 375, 625, 875]),
        (rs.EvenlySpaced(3), [166, 500, 833]),
        (rs.EvenlySpaced(4, noise="own"), [1, 334, 666, 999]),
        (rs.EvenlySpaced(1, noise="own"), [500]),
        (rs.Explicit([7, 3]), [7, 3]),
    ],
)
def test_a_grid_gives_every_sample_the_same_timesteps(plan: Any, steps: list[int]) -> None:
    pairs = plan.pairs("c", IDS, 1000)
    assert pairs.timesteps.tolist() == [steps] * 5
    assert pairs.noise == plan.noise


def test_a_grid_is_known_again_by_its_description() -> None:
    for plan in (rs.EvenlySpaced(4), rs.Explicit([3, 1], draws=2, seed=7), rs.EvenlySpaced(2, noise="own", seed=3)):
        again = grid_from_spec(plan.spec())
        assert again is not None
        assert again.spec() == plan.spec()
    assert "noise" not in rs.EvenlySpaced(4, noise="own").spec()  # as stores were described before plans said it
    assert grid_from_spec({"kind": "EvenlySpaced", "count": 4, "draws": 1}) == rs.EvenlySpaced(4, seed=0, noise="own")
    assert grid_from_spec({"kind": "Recorded"}) is None


@pytest.mark.parametrize(
    "bad",
    [
        lambda: rs.EvenlySpaced(0),
        lambda: rs.Explicit([]),
        lambda: rs.Explicit([1, 1]),
        lambda: rs.Explicit([1], seed=-1),
        lambda: rs.EvenlySpaced(2, noise="shared"),  # type: ignore[arg-type]
        lambda: rs.Explicit([0.5, 10.9]),  # type: ignore[list-item]
    ],
)
def test_plans_without_sense_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"EvenlySpaced|Explicit|seed|noise must be one of"):
        bad()


def test_a_recorder_continues_and_keeps_what_earlier_checkpoints_saw(tmp_path: Path, scheduler: Any) -> None:
    recorder = rs.TrainingRecorder(tmp_path, 5, scheduler)
    recorder.step([0, 1, 2, 3, 4], [10, 11, 12, 13, 14], 0, 1.0)
    recorder.checkpoint("a")
    again = rs.TrainingRecorder(tmp_path, 5, scheduler)
    again.step([1, 2], [51, 52], None, 0.5)
    again.checkpoint("b")
    plan = rs.Recorded(tmp_path)
    assert plan.pairs("a", IDS, 100).timesteps.ravel().tolist() == [10, 11, 12, 13, 14]
    assert plan.pairs("b", IDS, 100).timesteps.ravel().tolist() == [10, 51, 52, 13, 14]
    assert plan.weight("b") == pytest.approx(0.5 * 2 / 5)
    with pytest.raises(ValueError, match="holds the record of 5 samples, not 6"):
        rs.TrainingRecorder(tmp_path, 6, scheduler)


@dataclass(frozen=True)
class Noting(TrainingRecord):
    """Notes which steps are read."""

    read: list[tuple[int, int]] = field(default_factory=list)

    def rows(self, after: int, until: int) -> Any:
        self.read.append((after, until))
        return super().rows(after, until)


def test_the_last_pair_of_each_sample_is_found_in_pieces_from_the_newest_step_back(
    tmp_path: Path, scheduler: Any
) -> None:
    rng = np.random.default_rng(0)
    recorder = rs.TrainingRecorder(tmp_path, 20, scheduler)
    for step in range(1, 41):
        ids = rng.integers(0, 10, 4) if step > 20 else np.arange(step - 1, step + 3) % 20  # some only in old steps
        recorder.step(ids, rng.integers(0, 100, 4), step, 0.1 / step)
        if step in (20, 30, 40):
            recorder.checkpoint(str(step))
    recorder.step(np.arange(20), [50] * 20, 41, 0.1)
    recorder.checkpoint("41")
    record = rs.read_record(tmp_path)
    assert record is not None
    for name, previous in (("20", 0), ("30", 20), ("40", 30)):
        noting = Noting(**vars(record))
        seen = last_seen(noting, name, steps_at_once=3)
        rows = record.rows(0, int(name))
        last = {int(row["sample"]): row for row in rows}
        assert seen.timestep.tolist() == [last[i]["timestep"] for i in range(20)]
        assert seen.seed.tolist() == [last[i]["noise_seed"] for i in range(20)]
        assert seen.weight == rows["lr"][rows["step"] > previous].sum() / 20  # bit for bit
        assert max(until - after for after, until in noting.read) == 3
    noting = Noting(**vars(record))
    last_seen(noting, "41", steps_at_once=3)
    assert noting.read == [(38, 41)]


@pytest.mark.parametrize(
    ("ids", "steps", "message"),
    [
        ([5], [1], r"sample id 5 is outside the recorded training set 0 \.\. 4"),
        ([1], [100], r"timestep 100 is outside the scheduler's range 0 \.\. 99"),
        ([1, 2], [3], "give one timestep per id"),
        (["x"], [3], "recorded sample ids are the integers"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, scheduler: Any, ids: Any, steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rs.TrainingRecorder(tmp_path, 5, scheduler).step(ids, steps, 0, 1.0)


def test_a_sample_that_was_never_trained_is_named(tmp_path: Path, scheduler: Any) -> None:
    recorder = rs.TrainingRecorder(tmp_path, 5, scheduler)
    with pytest.raises(ValueError, match="no step before it"):
        recorder.checkpoint("a")
    recorder.step([0, 1, 2, 4], [1, 1, 1, 1], 0, 1.0)
    recorder.checkpoint("a")
    with pytest.raises(ValueError, match="sample 3 was never trained before checkpoint 'a'"):
        rs.Recorded(tmp_path).pairs("a", IDS, 100)
