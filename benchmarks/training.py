"""What recording, and sketching while training, cost of a training step.

Contenders train models of their own, alike, on the same batches: noise, forward, backward, AdamW. They run in turn,
round after round, in an order that changes; a cost is the median over the rounds of the contender's time against the
plain step's of the same round, "mean" compares the sums over all rounds. "recorder.step alone" is the time inside that
call, without the training around it. At the end one step's sketches are compared with those of a sketcher with frozen
weights.

    python benchmarks/training.py --model u-cifar --batch 16 --rounds 7
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from models import CONFIGS, build

import retrac_scale as rs
from retrac_scale.training.sketches import SketchPlan

SCHEDULER: Any = DDPMScheduler()
N = 1024
LR = 2e-4


class Training:
    """A model in training, with a recorder or without."""

    def __init__(self, name: str, batch: int, folder: Path, recorder: dict[str, Any] | None) -> None:
        self.name, self.model, self.batch = name, build(name).train(), batch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, fused=True)
        config = self.model.config
        shape = (N, config.in_channels, config.sample_size, config.sample_size)
        self.images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        self.steps = 0
        self.recorder: rs.TrainingRecorder | None = None
        self.recording = 0.0
        if recorder is not None:
            sketching = {"store": folder / "store.zarr", "model": self.model} if "sketch" in recorder else {}
            self.recorder = rs.TrainingRecorder(folder / "recorded", N, SCHEDULER, **recorder, **sketching)

    def losses(self, step: int) -> tuple[Any, Any, torch.Tensor]:
        """Ids, timesteps and losses `[n]` of a step's batch."""
        rng = np.random.default_rng(step)
        ids, steps = rng.permutation(N)[: self.batch], torch.from_numpy(rng.integers(0, 1000, self.batch))
        noise = rs.draw_noise(self.images.shape[1:], ids, steps, step)
        noisy = SCHEDULER.add_noise(self.images[ids], noise, steps)
        prediction = self.model(noisy, steps, return_dict=False)[0]
        return ids, steps, (prediction - noise).square().flatten(1).mean(1)

    def step(self) -> None:
        """One optimizer step."""
        ids, steps, losses = self.losses(self.steps)
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        if self.recorder is not None:
            begun = time.perf_counter()
            self.recorder.step(ids, steps, self.steps, LR)
            self.recording = time.perf_counter() - begun
        self.steps += 1


def difference(training: Training, projection: Any, folder: Path) -> float:
    """Largest relative difference between a step's sketches and a replay's with frozen weights."""
    weights = {name: value.clone() for name, value in training.model.state_dict().items()}
    ids, _, _ = training.losses(training.steps)
    training.step()
    training.recorder.checkpoint("last")
    kept = rs.open_store(folder / "store.zarr").sketches("last")[ids, 0]
    replay = Training(training.name, training.batch, folder, None)
    replay.model.load_state_dict(weights)
    with rs.GradientSketcher(replay.model, projection) as sketcher:
        sketch, _ = sketcher(replay.losses(training.steps - 1)[2])
    expected = sketch.numpy()
    return float((np.linalg.norm(kept - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def main() -> None:
    """Parse, run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="u-small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    projections = {"sketched, default": rs.LowRank(), "sketched, CountSketch": rs.CountSketch(2048)}
    with tempfile.TemporaryDirectory() as place:
        options: dict[str, dict[str, Any] | None] = {
            "plain step": None,
            "recorded": {},
            **{name: {"sketch": projection, "dtype": "float32"} for name, projection in projections.items()},
            "sketched, half the steps": {"sketch": rs.LowRank(), "share": 0.5},
        }
        folders = {name: Path(place) / str(number) for number, name in enumerate(options)}
        trainings = {
            name: Training(arguments.model, arguments.batch, folders[name], option) for name, option in options.items()
        }
        for training in trainings.values():
            for _ in range(2):
                training.step()
        seconds: dict[str, list[float]] = {name: [] for name in trainings}
        parts: dict[str, list[float]] = {name: [] for name in trainings}
        for number in range(arguments.rounds):
            names = list(trainings)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                begun = time.perf_counter()
                trainings[name].step()
                seconds[name].append(time.perf_counter() - begun)
                parts[name].append(trainings[name].recording)
        off = {name: difference(trainings[name], projections[name], folders[name]) for name in projections}
    plain = seconds["plain step"]
    rows = [
        {
            "contender": name,
            "seconds_per_step": statistics.median(times),
            "cost": statistics.median(own / base for own, base in zip(times, plain, strict=True)) - 1,
            "mean_cost": sum(times) / sum(plain) - 1,
            "recorder_alone": statistics.median(parts[name]) / statistics.median(plain),
            "seconds": times,
        }
        for name, times in seconds.items()
    ]
    print(
        f"{arguments.model}, batch {arguments.batch}, {rs.LowRank()}, {arguments.threads} thread(s), "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    print(f"{'contender':24} {'s/step':>8} {'cost':>8} {'mean':>8} {'recorder.step alone':>20}")
    for row in rows:
        print(
            f"{row['contender']:24} {row['seconds_per_step']:8.3f} {row['cost']:8.2%} {row['mean_cost']:8.2%} "
            f"{row['recorder_alone']:20.3%}"
        )
    print("largest difference of a sketch from its replay:", ", ".join(f"{name} {x:.1e}" for name, x in off.items()))
    share = SketchPlan(rs.LowRank(), None, share=0.5)
    print(
        f"half the steps: {sum(share.takes(step + 1) for step in range(2, 2 + arguments.rounds))} of {arguments.rounds}"
    )
    if arguments.out:
        run = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
        }
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        arguments.out.write_text(json.dumps({**run, **settings, "difference": off, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
