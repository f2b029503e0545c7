"""Pairs per second of gradient sketching, against the training step of the same model and against peers.

The floor is one training step without the optimizer: batched forward and backward that leaves the weights' gradients.
Contenders run in turn, round after round, so that a drifting machine touches all alike; a ratio is the median over the
rounds of the floor's time divided by the contender's. Peak memory comes from one fresh process per contender.

    python benchmarks/sketching.py --model u-small --batch 64
    python benchmarks/sketching.py --model u-cifar --batch 16 --skip-peers
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from models import CONFIGS, build, noisy_batch
from torch import Tensor, nn
from tqdm import tqdm

import retrac_scale as rs
from retrac_scale.native.memory import keep_freed_pages

Step = Callable[[], Any]
PEERS = (
    "vmap(grad), no projection",
    "batch-1 loop, no projection",
    "opacus, no projection",
    "TRAKer.featurize",
    "dattri",
)


class Bench:
    """The contenders: each method makes a step that handles one batch of n pairs."""

    def __init__(self, model: str, n: int, dim: int, device: str) -> None:
        self.model: nn.Module = build(model, device)
        self.n, self.dim, self.device = n, dim, device
        self.noisy, self.timesteps, self.noise = noisy_batch(self.model, n, device)

    @cached_property
    def channels_last(self) -> nn.Module:
        """The model as a DiffusionTask in float32 has it."""
        if self.device != "cpu":
            return self.model
        return copy.deepcopy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def prediction(self, model: nn.Module, *, bf16: bool = False) -> Tensor:
        """Of a model, `[n, c, size, size]`."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16):
            predicted: Tensor = model(self.noisy, self.timesteps, return_dict=False)[0].float()
        return predicted

    def losses(self, model: nn.Module, *, bf16: bool = False) -> Tensor:
        """`[n]`."""
        return (self.prediction(model, bf16=bf16) - self.noise).square().flatten(1).mean(1)

    def floor(self, *, bf16: bool = False, channels_last: bool = False) -> Step:
        """The training step."""
        model = self.channels_last if channels_last else self.model

        def step() -> None:
            model.zero_grad(set_to_none=True)
            self.losses(model, bf16=bf16).sum().backward()

        return step

    def frozen(self, *, bf16: bool = False) -> Step:
        """Forward and backward for activations alone: what a sketch cannot go below."""
        model = copy.deepcopy(self.model).requires_grad_(False)

        def step() -> None:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16):
                prediction = model(self.noisy.detach().requires_grad_(), self.timesteps, return_dict=False)[0]
            (prediction.float() - self.noise).square().flatten(1).mean(1).sum().backward()

        return step

    def ours(self, projection: Any, *, bf16: bool = False) -> Step:
        """Sketch and norm of every pair."""
        model = self.model if bf16 else self.channels_last
        sketcher = rs.GradientSketcher(model, projection)

        def step() -> tuple[Tensor, Tensor]:
            with sketcher:
                return sketcher(self.losses(model, bf16=bf16))

        return step

    def measures(self, projection: Any, count: int, *, shared: bool) -> Step:
        """Sketch and norm of every pair for several functions of the output, from one forward pass or one for each."""
        sketcher = rs.GradientSketcher(self.channels_last, projection)

        def step() -> None:
            with sketcher:
                for number in range(count):
                    if number == 0 or not shared:
                        prediction = self.prediction(self.channels_last)
                    values = (prediction - number * self.noise).square().flatten(1).mean(1)
                    sketcher(values, retain_graph=shared and number + 1 < count)

        return step

    def contenders(self) -> dict[str, Callable[[], Step]]:
        """Name -> maker of its step."""
        lowrank, countsketch = rs.LowRank(), rs.CountSketch(self.dim)
        return {
            "floor fp32": lambda: self.floor(),
            "floor bf16": lambda: self.floor(bf16=True),
            "channels-last floor fp32": lambda: self.floor(channels_last=True),
            "weights frozen fp32": lambda: self.frozen(),
            "weights frozen bf16": lambda: self.frozen(bf16=True),
            "LowRank fp32": lambda: self.ours(lowrank),
            "LowRank bf16": lambda: self.ours(lowrank, bf16=True),
            **{
                f"{name} {count} {way}": partial(self.measures, projection, count, shared=way == "measures")
                for name, projection in (("LowRank", lowrank), ("CountSketch", countsketch))
                for count in (2, 5)
                for way in ("measures", "apart")
            },
            "CountSketch fp32": lambda: self.ours(countsketch),
            "CountSketch bf16": lambda: self.ours(countsketch, bf16=True),
            "vmap(grad), no projection": self.vmap,
            "batch-1 loop, no projection": self.loop,
            "opacus, no projection": self.opacus,
            "TRAKer.featurize": self.traker,
            "dattri": self.dattri,
        }

    def _functional(self, weights: Any, noisy: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        prediction = torch.func.functional_call(
            self.model, weights, (noisy[None], timestep[None]), {"return_dict": False}
        )[0]
        return (prediction[0] - noise).square().mean()

    def vmap(self) -> Step:
        """torch.func's per-sample gradients, left as they are."""
        weights = dict(self.model.named_parameters())
        gradients = torch.func.vmap(torch.func.grad(self._functional), in_dims=(None, 0, 0, 0))
        return lambda: gradients(weights, self.noisy, self.timesteps, self.noise)

    def loop(self) -> Step:
        """One backward pass per pair, as in the paper's code."""

        def step() -> None:
            for row in range(self.n):
                self.model.zero_grad(set_to_none=True)
                prediction = self.model(self.noisy[row : row + 1], self.timesteps[row : row + 1], return_dict=False)[0]
                (prediction - self.noise[row : row + 1]).square().mean().backward()

        return step

    def opacus(self) -> Step:
        """opacus' hooks: `grad_sample` on every parameter."""
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(
            copy.deepcopy(self.model).train(), loss_reduction="sum"
        )  # it records in train mode only

        def step() -> None:
            wrapped.zero_grad(set_to_none=True)
            prediction = wrapped(self.noisy, self.timesteps, return_dict=False)[0]
            (prediction - self.noise).square().flatten(1).mean(1).sum().backward()
            for parameter in wrapped.parameters():
                parameter.grad_sample = None

        return step

    def traker(self) -> Step:
        """TRAK 0.3: vmap gradients and BasicProjector (CudaProjector on a GPU with fast_jl)."""
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput

        functional = self._functional

        class Loss(AbstractModelOutput):
            def __init__(self) -> None:
                super().__init__()

            @staticmethod
            def get_output(model: Any, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
                return functional(weights, *sample)

            def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
                return torch.ones(len(batch[0]), 1, device=batch[0].device)

        folder = tempfile.mkdtemp()
        step_number = iter(range(10**6))

        def step() -> None:
            traker.load_checkpoint(self.model.state_dict(), model_id=next(step_number))
            traker.featurize((self.noisy, self.timesteps, self.noise), num_samples=self.n)

        traker = TRAKer(
            self.model,
            Loss(),
            train_set_size=self.n,
            save_dir=folder,
            device=self.device,
            proj_dim=self.dim,
            use_half_precision=False,
            logging_level="ERROR",
        )
        return step

    def dattri(self) -> Step:
        """dattri's TracIn with its random projection; its self-influence call projects each pair once."""
        from dattri.algorithm.tracin import TracInAttributor
        from dattri.task import AttributionTask

        def loss(weights: Any, data: Any) -> Tensor:
            return self._functional(weights, *(x[0] if x.ndim > 3 or x.ndim == 1 else x for x in data))

        task = AttributionTask(loss_func=loss, model=self.model, checkpoints=self.model.state_dict())
        attributor = TracInAttributor(
            task,
            weight_list=torch.ones(1),
            normalized_grad=False,
            projector_kwargs={"proj_dim": self.dim, "proj_max_batch_size": 32, "device": self.device},
            device=self.device,
        )
        data = torch.utils.data.TensorDataset(self.noisy, self.timesteps, self.noise)
        loader = torch.utils.data.DataLoader(data, batch_size=self.n)
        return lambda: attributor.self_attribute(loader)


def measure(steps: dict[str, Step], rounds: int, peer_rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round, in random order; the first, uncounted, round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), unit="round"):
        for name in random.Random(number).sample(list(steps), len(steps)):
            if name in PEERS and number > peer_rounds:
                continue
            start = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if number or name in PEERS[3:]:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_mib() -> float:
    """Of this process; getrusage's would include the parent's, from before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak_rss(arguments: argparse.Namespace, name: str) -> float:
    """MiB at the peak of a fresh process that does two steps."""
    command = [sys.executable, __file__, "--rss-of", name, "--model", arguments.model, "--batch", str(arguments.batch)]
    command += ["--dim", str(arguments.dim), "--threads", str(arguments.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Parse, run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="u-small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="comma-separated contenders (the floor always runs)")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--rss-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()  # for all contenders, as `sketch` does
    bench = Bench(arguments.model, arguments.batch, arguments.dim, arguments.device)
    makers = bench.contenders()
    if arguments.rss_of:
        step = makers[arguments.rss_of]()
        for _ in range(2):
            step()
        print(peak_mib())
        return
    chosen = arguments.only.split(",") if arguments.only else list(makers)
    chosen = [name for name in chosen if not (arguments.skip_peers and name in PEERS)]
    steps = {name: makers[name]() for name in dict.fromkeys(["floor fp32", *chosen])}
    seconds = measure(steps, arguments.rounds, 1, arguments.device)
    floor = seconds["floor fp32"]
    rows = []
    for name, times in seconds.items():
        rows.append(
            {
                "contender": name,
                "pairs_per_s": arguments.batch / statistics.median(times),
                "of_floor": statistics.median(
                    base / own for base, own in zip(floor[-len(times) :], times, strict=True)
                ),
                "peak_rss_mib": None if arguments.skip_memory else peak_rss(arguments, name),
                "seconds": times,
            }
        )
    print(
        f"{arguments.model}, batch {arguments.batch}, k = {arguments.dim}, {arguments.threads} thread(s), "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    print(f"{'contender':30} {'pairs/s':>10} {'of floor':>9} {'peak MiB':>9}")
    for row in rows:
        memory = "" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']:9.0f}"
        print(f"{row['contender']:30} {row['pairs_per_s']:10.2f} {row['of_floor']:9.3f} {memory:>9}")
    if arguments.out:
        settings = {key: value for key, value in vars(arguments).items() if key in ("model", "batch", "dim", "threads")}
        run = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
        }
        arguments.out.write_text(json.dumps({**run, **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
