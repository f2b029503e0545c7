"""Random small models, sketched and compared with plain float64 autograd: every one right, or refused by name.

    python -m benchmarks.fuzz --models 500 --log fuzz.tsv   # goes on where the log ends
    python -m benchmarks.fuzz --seed 17                     # one of them again

A model is a chain of random layers in one of three layouts (vectors, tokens, images), with in-place activations, ties,
functional reuse, modules of the user's own, hooks, wrappers and precisions. `GradientSketcher` sketches a batch three
times, the first time with its check; a training step sketches it as a training loop would; `sketch` measures it as a
denoiser at two timesteps. What is right is told by autograd, one sample at a time, in float64; with 16 bits on the way,
by autograd of each loss in the same precision.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import retrac_scale as rs
from retrac_scale.gradients import UncapturableError
from retrac_scale.projections import GradientMismatchError
from retrac_scale.projections.live import LiveSketcher
from retrac_scale.runtime.tasks import FailedTasksError

WIDTH, TOKENS, SIDE, SAMPLES = 8, 4, 5, 4
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
REFUSALS = (UncapturableError, GradientMismatchError)
STEPS = [20, 70]
SCHEDULER: Any = DDPMScheduler(num_train_timesteps=100)

Shape = tuple[int, ...]
SHAPES: dict[str, Shape] = {"vectors": (WIDTH,), "tokens": (TOKENS, WIDTH), "images": (WIDTH, SIDE, SIDE)}


class Dice:
    """Choices by seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def under(self, count: int) -> int:
        """0 .. count - 1."""
        return int(torch.randint(count, (), generator=self._generator))

    def chance(self, share: float) -> bool:
        """True so often."""
        return float(torch.rand((), generator=self._generator)) < share

    def one(self, *options: Any) -> Any:
        """One of them."""
        return options[self.under(len(options))]


class Apply(nn.Module):
    """A function of a module and its input, as user code around a layer."""

    def __init__(self, inner: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.use = inner, use

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        return self.use(self.inner, x)


class Gain(nn.Module):
    """Parameters of its own beside a layer with a rule."""

    def __init__(self, inner: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(1 + 0.3 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        return self.inner(x) * self.gain  # type: ignore[no-any-return]


class Bilinear(nn.Module):
    """Multiplies its input with a function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        return self.inner(x, x.tanh())  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An LSTM or GRU."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.inner, self.flip = kind(WIDTH, WIDTH, batch_first=batch_first), not batch_first  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        y = self.inner(x.transpose(0, 1) if self.flip else x)[0]
        return y.transpose(0, 1) if self.flip else y  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Over tokens, with a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        return x + self.inner(x, x, x)[0]  # type: ignore[no-any-return]


class Positions(nn.Module):
    """A table looked up once for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        return x + self.table(torch.arange(x.shape[1]))  # type: ignore[no-any-return]


def layer(dice: Dice, layout: str) -> nn.Module:
    """A layer that keeps the shape."""
    w = WIDTH
    norm = nn.utils.parametrizations.weight_norm
    common: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(w, w, bias=dice.chance(0.7)),
        lambda: nn.LayerNorm(w, bias=dice.chance(0.7)),
        lambda: nn.RMSNorm(w),
        lambda: Gain(nn.Linear(w, w), (w,)),
        lambda: norm(nn.Linear(w, w)),
        lambda: nn.utils.weight_norm(nn.Linear(w, w)),  # type: ignore[no-untyped-call]
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(w, w)).eval(),
        Bilinear,
    ]
    of: dict[str, list[Callable[[], nn.Module]]] = {
        "vectors": [*common, lambda: nn.GroupNorm(2, w), lambda: nn.BatchNorm1d(w), nn.PReLU],
        "tokens": [
            *common,
            lambda: Recurrent(dice.one(nn.LSTM, nn.GRU), dice.chance(0.7)),
            Attention,
            Positions,
            lambda: Apply(nn.Linear(w, w), lambda inner, x: inner(x.transpose(0, 1)).transpose(0, 1)),
            lambda: Apply(nn.Conv1d(w, w, 3, padding=1), lambda inner, x: inner(x.mT).mT),
        ],
        "images": [
            lambda: nn.Conv2d(w, w, dice.one(1, 3), padding="same", groups=dice.one(1, 2), bias=dice.chance(0.7)),
            lambda: nn.Conv2d(w, w, 3, padding=1, padding_mode=dice.one("circular", "reflect")),
            lambda: nn.ConvTranspose2d(w, w, 3, padding=1),
            lambda: nn.GroupNorm(dice.one(1, 2, w), w),
            lambda: nn.BatchNorm2d(w, affine=dice.chance(0.5), track_running_stats=dice.chance(0.8)),
            lambda: nn.InstanceNorm2d(w, affine=True),
            lambda: nn.PReLU(w),
            lambda: norm(nn.Conv2d(w, w, 3, padding=1)),
            lambda: Apply(nn.Linear(w, w), lambda inner, x: inner(x.movedim(1, -1)).movedim(-1, 1)),
            lambda: Gain(nn.Conv2d(w, w, 1), (w, 1, 1)),
        ],
    }
    made: nn.Module = dice.one(*of[layout])()
    return made


def around(dice: Dice, inner: nn.Module) -> nn.Module:
    """What user code does with a layer and its output."""

    def tied(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        weight = next((p for p in module.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1] == x.shape[-1]), None)
        return y if weight is None else y + 0.1 * F.linear(y.tanh(), weight)  # type: ignore[no-any-return]

    def add_into(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        y += x
        return y  # type: ignore[no-any-return]

    def change_slice(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        y[:, :2] *= 2
        return y  # type: ignore[no-any-return]

    def change_view(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        y.view_as(y).mul_(0.5)
        return y  # type: ignore[no-any-return]

    def meet(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        return y + 0.1 * y.mean(0)  # type: ignore[no-any-return]

    uses: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda module, x: x + module(x),
        lambda module, x: module(module(x).tanh()),
        lambda module, x: module(x).mul_(2),
        lambda module, x: F.relu(module(x), inplace=True),
        lambda module, x: checkpoint(module, x, use_reentrant=False),  # type: ignore[no-any-return]
        lambda module, x: module(x) + module(x.detach()).detach(),
        add_into,
        change_slice,
        change_view,
        tied,
        meet,
    ]
    return Apply(inner, dice.one(*uses)) if dice.chance(0.5) else inner


def activation(dice: Dice) -> nn.Module:
    """In place or not."""
    made: nn.Module = dice.one(nn.SiLU(inplace=True), nn.ReLU(inplace=True), nn.Tanh(), nn.GELU(), nn.Identity())
    return made


def build(seed: int) -> tuple[nn.Module, str, torch.dtype, bool]:
    """A model, its layout, its precision, and whether it is run under autocast."""
    dice = Dice(seed)
    torch.manual_seed(seed)
    layout = dice.one(*SHAPES)
    layers = [around(dice, layer(dice, layout)) for _ in range(2 + dice.under(3))]
    model = nn.Sequential(*[part for one in layers for part in (one, activation(dice))])
    linear = [one for one in model.modules() if type(one) is nn.Linear and "weight" in dict(one.named_parameters())]
    if len(linear) > 1 and dice.chance(0.3):
        linear[-1].weight = linear[0].weight
    if dice.chance(0.2):
        hooked = dice.one(*[module for module in model.modules() if not list(module.children())])
        hooked.register_forward_hook(
            lambda module, args, output: 1.5 * output if isinstance(output, Tensor) else output
        )
    if dice.chance(0.9):
        model.eval()
    if dice.chance(0.2):
        next(model.parameters()).requires_grad_(False)
    dtype = dice.one(torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return model.to(dtype), layout, dtype, dtype == torch.float32 and dice.chance(0.2)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """`[n]`, without symmetries."""
    values: Tensor = model(x).double().sin().square().flatten(1).mean(1)
    return values


def expected(model: nn.Module, x: Tensor, *, half: bool, autocast: bool) -> Tensor:
    """Gradients `[n, p]` by autograd, in float64 and each sample alone, or as they come; float64 `[n, p]`."""
    if not half:
        model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        batch = losses_of(model, x) if half else torch.cat([losses_of(model, one) for one in x.double().split(1)])
    return rows_of(batch, parameters)


def rows_of(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Gradients of `[n]` losses one by one, float64 `[n, p]`."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten().double() for grad in grads]))
    return torch.stack(rows)


def by_sketcher(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Of a checked batch, and two that are not."""
    found = []
    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                values = losses_of(model, x)
            found.append(sketcher(values)[0])
    return found


def by_training(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Of two steps of a training loop, the first of them checked."""
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    try:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                values = losses_of(model, x)
            torch.autograd.backward(values.sum())
        return [sketch for sketch, _ in sketcher.passes]
    finally:
        sketcher.detach()


class Denoiser(nn.Module):
    """A model that is told of time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """`[n, ...]` -> the same shape."""
        told = 1 + timestep.to(sample.dtype) / 100
        return self.model(sample) * told.view(-1, *[1] * (sample.ndim - 1))  # type: ignore[no-any-return]


def by_sketch(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Of a store of all samples at `STEPS`, in one batch; `[n t, p]`."""
    task = rs.DiffusionTask(Denoiser(model), SCHEDULER, autocast="bfloat16" if autocast else None)
    try:
        store = rs.sketch(
            task,
            x,
            None,
            checkpoints={"a": dict(task.model.state_dict())},
            timesteps=rs.Explicit(STEPS),
            projection=rs.Identity(),
            dtype="float32",
            batch_size=len(x) * len(STEPS),
            progress=False,
        )
    except FailedTasksError as error:
        if "NaN or infinite" in str(error):
            return [torch.full((1,), torch.nan)]
        if not any(kind.__name__ in str(error) for kind in REFUSALS):
            raise
        raise GradientMismatchError(str(error)) from error
    return [torch.from_numpy(store.sketches("a")).flatten(0, 1)]


def expected_of_pairs(model: nn.Module, x: Tensor, *, half: bool, autocast: bool) -> Tensor:
    """Gradients of the diffusion loss at `STEPS`, as `expected` has them; float64 `[n t, p]`."""
    denoiser, steps = Denoiser(model).eval(), torch.tensor(STEPS * len(x))
    images = x.repeat_interleave(len(STEPS), 0)
    noise = rs.draw_noise(tuple(x.shape[1:]), None, steps.numpy(), 0)
    if half:
        task = rs.DiffusionTask(denoiser, SCHEDULER, autocast="bfloat16" if autocast else None)
        losses = task.losses(images, steps, noise.to(x.dtype), {})
    else:
        denoiser.double()
        signal = SCHEDULER.alphas_cumprod.double()[steps].view(-1, *[1] * (x.ndim - 1))
        noisy = signal.sqrt() * images.double() + (1 - signal).sqrt() * noise.double()
        alone = [denoiser(noisy[i : i + 1], steps[i : i + 1]) for i in range(len(steps))]
        losses = (torch.cat(alone) - noise.double()).square().flatten(1).mean(1)
    return rows_of(losses, [p for p in denoiser.parameters() if p.requires_grad])


@dataclass(frozen=True)
class Way:
    """A way to sketch a batch: what it finds, what is right, and how many batches it sketches."""

    found: Callable[[nn.Module, Tensor, bool], list[Tensor]]
    expected: Callable[..., Tensor]
    batches: int


WAYS = {
    "sketcher": Way(by_sketcher, expected, 3),
    "training": Way(by_training, expected, 2),
    "sketch": Way(by_sketch, expected_of_pairs, 1),
}


def verdict(seed: int, way: Way) -> tuple[str, str]:
    """Right, refused, refused by torch itself, or wrong; and details."""
    model, layout, dtype, autocast = build(seed)
    x = torch.randn(SAMPLES, *SHAPES[layout], generator=torch.Generator().manual_seed(seed)).to(dtype)
    if not any(p.requires_grad for p in model.parameters()):
        return "nothing to sketch", ""
    half = autocast or dtype.itemsize < 4
    try:
        truth = way.expected(build(seed)[0], x, half=half, autocast=autocast)
        torch.autograd.backward(losses_of(build(seed)[0], x).sum())
    except (RuntimeError, ValueError) as error:
        return "torch refuses", str(error)
    try:
        found = way.found(model, x, autocast)
    except REFUSALS as error:
        return "refused", str(error)
    if len(found) < way.batches:
        return ("right" if not truth.any() else "wrong"), f"{len(found)} batches sketched"
    if dtype == torch.float16 and not all(bool(one.isfinite().all()) for one in found):
        return "not finite", ""
    scale = truth.norm(dim=1).clamp_min(1e-12)
    off = max(float(((one.double() - truth).norm(dim=1) / scale).max()) for one in found)
    right = off <= (HALF_TOLERANCE if half else TOLERANCE)
    return ("right" if right else "wrong"), f"off by {off:.1e} ({layout}, {dtype}, autocast {autocast})"


def main() -> None:
    """Run, write down, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--log", type=Path, help="a line for each model; those that it has are not run again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.first, given.first + given.models) if given.seed is None else [given.seed]
    lines = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    known = {(way, int(seed)): kind for way, seed, kind in (line.split("\t")[:3] for line in lines)}
    for name in given.ways:
        for seed in seeds:
            if (name, seed) in known:
                continue
            kind, details = verdict(seed, WAYS[name])
            known[name, seed] = kind
            if given.log:
                with given.log.open("a") as file:
                    file.write(f"{name}\t{seed}\t{kind}\t{' '.join(details.split())}\n")
            if kind == "wrong" or given.seed is not None:
                print(f"{name} seed {seed}: {kind}, {details}\n{build(seed)[0]}", flush=True)
        print(f"{name}: {dict(Counter(known[name, seed] for seed in seeds))}", flush=True)
    sys.exit(any(known[name, seed] == "wrong" for name in given.ways for seed in seeds))


if __name__ == "__main__":
    main()
