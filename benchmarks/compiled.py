"""Every compiled pass against the same in plain torch: is it worth its lines on this machine?

    python -m benchmarks.compiled              # one thread
    python -m benchmarks.compiled --threads 2

Both sides work on the same arrays in one process, in turns; medians of the turns' ratios, of CPU time with one thread,
of time with several. The results of both are compared first. With --keep the table is added to
benchmarks/results/compiled.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measurement_page import cpu_name
from retrac_scale.gradients.factored import FactoredGradients, pairs_of
from retrac_scale.gradients.norms import squared_norm
from retrac_scale.gradients.rules.normalization import _watched, group_norm
from retrac_scale.index import approximate, kernels, plain
from retrac_scale.projections.folding import fold, fold_by_block
from retrac_scale.store.rounding import to_int8

PAGE = Path(__file__).parent / "results" / "compiled.md"
TURNS = 7
K = 4096

Way = Callable[[], Any]


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_of(entries: int) -> tuple[Any, Tensor, Any]:
    """Of a projection to K entries: for the compiled pass, and for torch, and shifts."""
    rng = np.random.default_rng(entries)
    signs = rng.choice(np.array([-1, 1], np.int8), entries)
    shifts = rng.integers(0, K, -(-entries // K))
    return (signs, shifts), torch.from_numpy(signs).float(), shifts


def linear(n: int = 16, positions: int = 256, size: int = 128) -> tuple[Way, Way]:
    """Gradients of a linear layer, formed, folded and measured."""
    left, right = drawn(0, n, 1, size, positions), drawn(1, n, 1, size, positions)
    pairs = pairs_of((1,), (1,), (1,), (0,), (positions,), (positions,))
    ours, signs, shifts = signs_of(size * size)
    sums = torch.zeros(n, 2 * K)

    def compiled() -> Any:
        sums.zero_()
        return fold(sums, FactoredGradients(left, right, (), pairs), ours, 1.0), sums

    def by_torch() -> Any:
        sums.zero_()
        formed = (left[:, 0] @ right[:, 0].mT).flatten(1)
        fold_by_block(sums, formed, signs, shifts, 1.0)
        return squared_norm(formed), sums

    return compiled, by_torch


def convolution(n: int = 16, side: int = 16, size: int = 64) -> tuple[Way, Way]:
    """Those of a 3 x 3 convolution, from images that are channels last."""
    left, right = (drawn(seed, n, size, side, side).contiguous(memory_format=torch.channels_last) for seed in range(2))
    pairs = pairs_of((3, 3), (1, 1), (1, 1), (1, 1), (side, side), (side, side))
    ours, signs, shifts = signs_of(9 * size * size)
    sums = torch.zeros(n, 2 * K)

    def compiled() -> Any:
        sums.zero_()
        lefts, rights = (x.flatten(2)[:, None] for x in (left, right))
        return fold(sums, FactoredGradients(lefts, rights, (3, 3), pairs), ours, 1.0), sums

    def by_torch() -> Any:
        sums.zero_()
        windows = F.unfold(right, 3, padding=1).view(n, size, 9, -1).movedim(2, 1).flatten(1, 2)
        formed = left.flatten(2) @ windows.mT  # [n, o, 9 i]: kernel positions before input features, as ours
        fold_by_block(sums, formed.flatten(1), signs, shifts, 1.0)
        return squared_norm(formed.flatten(1)), sums

    return compiled, by_torch


def formed(n: int = 16, entries: int = 2**18) -> tuple[Way, Way]:
    """Gradients that are there, folded and measured."""
    given = drawn(0, n, entries)
    ours, signs, shifts = signs_of(entries)
    sums = torch.zeros(n, 2 * K)

    def compiled() -> Any:
        sums.zero_()
        return fold(sums, given, ours, 1.0), sums

    def by_torch() -> Any:
        sums.zero_()
        fold_by_block(sums, given, signs, shifts, 1.0)
        return squared_norm(given), sums

    return compiled, by_torch


def norms(n: int = 16, side: int = 32, size: int = 64) -> tuple[Way, Way]:
    """A group norm with frozen weights: the gradient of its input, and those of its weight and bias by sample."""
    layer = torch.nn.GroupNorm(8, size)
    x, grad = (drawn(seed, n, size, side, side).contiguous(memory_format=torch.channels_last) for seed in range(2))
    seen: dict[str, Tensor] = {}

    def backward(frozen: bool) -> Any:
        layer.requires_grad_(not frozen)
        given = x.detach().requires_grad_()
        output = layer(given)
        if frozen:
            output = _watched(layer, given, output, lambda g, *rest: seen.update(group_norm(layer, x, g, n, *rest)))
        (of_input,) = torch.autograd.grad(output, given, grad)
        if not frozen:
            seen.update(group_norm(layer, x, grad, n))
        return of_input, seen["weight"], seen["bias"]

    return lambda: backward(True), lambda: backward(False)


def encoding(n: int = 4096, k: int = 2048) -> tuple[Way, Way]:
    """Float32 rows to int8."""
    rows = drawn(0, n, k)
    stored, scale = np.empty((n, k), np.int8), np.empty(n, np.float32)

    def compiled() -> Any:
        to_int8(rows.numpy(), stored, scale)
        return torch.from_numpy(stored), torch.from_numpy(scale)

    def by_torch() -> Any:
        step = rows.abs().amax(1) / 127
        return (rows / step[:, None]).round_().to(torch.int8), step

    return compiled, by_torch


def scan(queries: int, n: int = 16384, k: int = 2048) -> tuple[Way, Way]:
    """Products of queries with int8 rows, as a scan makes them."""
    rng = np.random.default_rng(0)
    rows, scale = rng.integers(-127, 128, (n, k)).astype(np.int8), np.ones(n, np.float32)
    asked = rng.standard_normal((queries, k))
    product = approximate.product_of(asked, np.linalg.norm(asked, axis=1), rows.dtype, 1)
    floats = torch.from_numpy(asked.T.astype(np.float32).copy())
    out = torch.empty(n, queries)

    def by_parts(multiply: Callable[[slice], Any], tile: int) -> Tensor:
        for start in range(0, n, tile):
            part = slice(start, start + tile)
            out[part] = multiply(part)
        return out / float(np.abs(asked).max())

    def compiled() -> Any:
        return (by_parts(lambda part: torch.from_numpy(product.weighted(rows[part], scale[part])), product.tile),)

    def by_torch() -> Any:
        return (by_parts(lambda part: torch.from_numpy(rows[part]).float() @ floats, 512),)

    return compiled, by_torch


def again(n: int = 4096, k: int = 2048) -> tuple[Way, Way]:
    """Exact scores of a scan's candidates, in float64."""
    rng = np.random.default_rng(0)
    rows, queries = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.standard_normal((8, k))
    places, asked = rng.integers(0, n, 2048), rng.integers(0, 8, 2048)
    out = np.empty(2048)

    def run(multiply: Any) -> Any:
        multiply(rows, places, queries, asked, out)
        return (torch.from_numpy(out.copy()),)

    return lambda: run(kernels.multiply), lambda: run(plain.multiply)


def passes() -> Iterator[tuple[str, tuple[Way, Way], float]]:
    """What is compared, its two ways, and how far apart they may be, relative to the largest entry."""
    yield "linear layer: formed, folded, measured", linear(), 1e-5
    yield "3 x 3 convolution: formed, folded, measured", convolution(), 1e-5
    yield "formed gradients: folded, measured", formed(), 1e-5
    yield "group norm: backwards, with its own gradients", norms(), 1e-5
    yield "rows to int8", encoding(), 1 / 127  # a tie may be rounded otherwise
    for queries in (1, 4, 16, 64):
        yield f"{queries} quer{'y' if queries == 1 else 'ies'} against int8 rows", scan(queries), 0.02
    yield "exact scores of candidates", again(), 1e-12


def check(ways: tuple[Way, Way], tolerance: float) -> None:
    """Raise AssertionError where the results of two ways differ by more than so much of the largest entry."""
    for ours, theirs in zip(*(copied(way()) for way in ways), strict=True):
        difference, largest = (ours - theirs).abs().max(), theirs.abs().max()
        assert difference <= tolerance * largest, f"results differ by {difference:.3g} of {largest:.3g}"


def compare(ways: tuple[Way, Way]) -> tuple[float, float, float]:
    """Median of torch's time over ours, and milliseconds of both at best."""
    clock = (
        time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    )  # the former counts waiting threads
    took: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for way, seconds in zip(ways, took, strict=True):
            started = clock()
            way()
            seconds.append(clock() - started)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*took, strict=True))
    return ratio, 1000 * min(took[0]), 1000 * min(took[1])


def copied(results: Any) -> list[Tensor]:
    """Both ways may write to one place."""
    return [result.detach().double().clone() for result in results]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help=f"add the table to {PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        f"## {cpu_name()}, {options.threads} thread(s)",
        f"{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f} before; torch {torch.__version__}.",
        "| pass | plain torch / compiled | compiled | plain torch |\n| --- | --- | --- | --- |",
    ]
    for name, ways, tolerance in passes():
        check(ways, tolerance)
        ratio, ours, theirs = compare(ways)
        lines.append(f"| {name} | {ratio:.2f} | {ours:.1f} ms | {theirs:.1f} ms |")
        print(lines[-1], flush=True)
    if options.keep:
        head = (
            "" if PAGE.exists() else "# Compiled passes against plain torch\n\n`python -m benchmarks.compiled --keep`\n"
        )
        with PAGE.open("a") as file:
            file.write(head + "\n" + "\n\n".join([*lines[:2], "\n".join(lines[2:])]) + "\n")


if __name__ == "__main__":
    main()
