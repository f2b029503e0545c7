"""Factored gradients: formed, and folded while they are formed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs
from retrac_scale.gradients.factored import BLOCK_BYTES, FactoredGradients, pairs_of
from retrac_scale.gradients.mixing import mix
from retrac_scale.gradients.tiles import LANES, POSITIONS, ROWS, WIDTH
from retrac_scale.projections.folding import fold


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_linear(left: Tensor, right: Tensor) -> FactoredGradients:
    """Of sides `[n, f, o, p]` and `[n, f, i, p]`."""
    size = (left.shape[3],)
    return FactoredGradients(left, right, (), pairs_of((1,), (1,), (1,), (0,), size, size))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Tensor, int]:
    """A convolution of one to three dimensions, rows of input, and how many of them are of one sample."""
    axes = draw(st.integers(1, 3))
    numbers = [
        draw(st.tuples(*[st.integers(low, high)] * axes)) for low, high in ((1, 3), (1, 3), (1, 2), (0, 2), (5, 7))
    ]
    kernel, stride, dilation, padding, size = numbers
    i, o = (draw(st.sampled_from([1, 3, 4, ROWS, ROWS + 5, WIDTH, 2 * WIDTH])) for _ in range(2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](i, o, kernel, stride, padding, dilation)
    frames = draw(st.integers(1, 2))
    return layer, drawn(draw(st.integers(0, 9)), 2 * frames, i, *size), frames


@given(convolutions(), st.booleans())
def test_factored_gradients_of_a_convolution_are_its_gradients(drawing: Any, last: bool) -> None:
    layer, inputs, frames = drawing
    grads = drawn(1, *layer(inputs).shape)
    if last:
        inputs, grads = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (inputs, grads))
    sizes = tuple(grads.shape[2:]), tuple(inputs.shape[2:])
    pairs = pairs_of(layer.kernel_size, layer.stride, layer.dilation, layer.padding, *sizes)
    left, right = (x.unflatten(0, (2, frames)).flatten(3) for x in (grads, inputs))
    found = FactoredGradients(left, right, layer.kernel_size, pairs).formed()
    for sample in range(2):
        rows = slice(sample * frames, (sample + 1) * frames)
        weight = layer.weight.detach().double().requires_grad_()
        convolved = (F.conv1d, F.conv2d, F.conv3d)[len(sizes[0]) - 1](
            inputs[rows].double(), weight, None, layer.stride, layer.padding, layer.dilation
        )
        (expected,) = torch.autograd.grad((convolved * grads[rows].double()).sum(), weight)
        torch.testing.assert_close(found[sample].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, POSITIONS, POSITIONS + 1, 2 * POSITIONS + 3])
@pytest.mark.parametrize("o", [2, 4, ROWS, 3 * ROWS + 7])
def test_long_sums_are_whole(positions: int, o: int) -> None:
    left, right = drawn(0, 2, 1, o, positions), drawn(1, 2, 1, 70, positions)
    expected = torch.einsum("nfop,nfip->noi", left.double(), right.double())
    torch.testing.assert_close(of_linear(left, right).formed().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_channel_given_many_times_is_taken_each_time(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("THREAD_BYTES", "SHARED_BYTES"):
        monkeypatch.setattr(f"retrac_scale.native.threads.{least}", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    left, right = drawn(0, 3, 1, 8, 40), drawn(1, 3, 1, 1, 40).expand(3, 1, 2 * WIDTH, 40)
    found, expected = torch.zeros(3, 64), torch.zeros(3, 64)
    signs, shifts = np.ones(16 * WIDTH, np.int8), np.zeros(-(-16 * WIDTH // 32), np.int64)
    fold(found, of_linear(left, right), (signs, shifts), 1)
    fold(expected, torch.einsum("nfop,nfip->noi", left, right).flatten(1), (signs, shifts), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("i", [1, LANES, WIDTH + 3])
@pytest.mark.parametrize("dim", [7, 512, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_folding_while_forming_is_folding_what_is_formed(
    i: int, dim: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for least in ("THREAD_BYTES", "SHARED_BYTES"):
        monkeypatch.setattr(f"retrac_scale.native.threads.{least}", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    o = BLOCK_BYTES // (4 * WIDTH) + 5  # more than are formed at a time
    products = of_linear(drawn(0, 3, 2, o, 6), drawn(1, 3, 2, i, 6))
    sums, expected = torch.zeros(3, 2 * dim), torch.zeros(3, 2 * dim)
    squares = fold(sums, products, signs(o * i, dim), 0.5)
    expected_squares = fold(expected, products.formed().flatten(1), signs(o * i, dim), 0.5)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, expected_squares, rtol=1e-5, atol=0)


def signs(count: int, dim: int) -> Any:
    """Of so many entries, and shifts of their blocks."""
    return np.where(drawn(2, count).numpy() > 0, 1, -1).astype(np.int8), np.arange(-(-count // dim)) * 3 % dim


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 3, 2)])
@pytest.mark.parametrize("o", [3, 37, 48])
@pytest.mark.parametrize(("rank", "i"), [(None, 5), (4, 5), (4, WIDTH + LANES), (4, 16), (8, 3 * WIDTH), (16, 140)])
def test_a_left_side_is_mixed_and_its_bias_goes_along(order: tuple[int, ...], o: int, rank: int | None, i: int) -> None:
    left, right = drawn(0, 3, 2, o, 150), drawn(1, 3, 2, i, 150)
    mixer = None if rank is None else drawn(3, rank, o)
    weight, bias = torch.einsum("nfop,nfip->noi", left.double(), right.double()), left.double().sum((1, 3))
    if mixer is not None:
        weight = mix(mixer.double(), weight)
    back = [order.index(axis) for axis in range(4)]
    products = of_linear(left.permute(order).contiguous().permute(back), right)
    products = replace(products, with_bias=True, mixer=mixer)
    assert products.shape == weight.shape
    torch.testing.assert_close(products.formed().double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products.bias().double(), bias, rtol=1e-4, atol=1e-4)
    sums, expected = torch.zeros(3, 64), torch.zeros(3, 64)
    squares = fold(sums, products, signs(weight[0].numel(), 32), 1, signs(bias.shape[1], 32))
    fold(expected, weight.flatten(1).float(), signs(weight[0].numel(), 32), 1)
    fold(expected, bias.float(), signs(bias.shape[1], 32), 1)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(squares.double(), weight.square().sum((1, 2)) + bias.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("projection", [rs.CountSketch(64), rs.LowRank(4, 64), rs.LowRank(4, 64, norm="exact")])
@pytest.mark.usefixtures("small_layers_mixed")
def test_sketches_of_factored_gradients_are_those_of_formed_ones(projection: Any) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.SiLU(), shared, nn.ConvTranspose2d(8, 4, 2, stride=2))
    inputs = drawn(0, 5, 3, 6, 6)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        sketcher = rs.GradientSketcher(model, projection)
        sketcher._projector.factored &= not found
        with sketcher:
            found.append(sketcher(model(inputs).sin().flatten(1).mean(1)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.usefixtures("small_layers_mixed")
def test_mixed_sketches_are_those_of_other_precisions_and_memory_orders(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(9, 80, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(80, 33, (1, 3), dilation=2, padding_mode="circular", padding=(0, 2)),
        nn.Flatten(2),
        nn.Linear(16, 40),
        nn.SiLU(),
        nn.Linear(40, 150),
    )
    inputs = drawn(0, 3, 9, 8, 8)
    projection = rs.LowRank(rank, 256)

    def sketched(model: nn.Module, inputs: Tensor) -> Tensor:
        with rs.GradientSketcher(model, projection) as sketcher:
            assert len(sketcher._projector.mixers) == 4
            sketch: Tensor = sketcher(model(inputs).sin().flatten(1).mean(1))[0]
        return sketch

    exact = sketched(copy.deepcopy(model).double(), inputs.double())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for found in (sketched(model, inputs), sketched(last, inputs.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-5 * float(exact.norm()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = sketched(model, inputs)
    assert float((half - exact).norm() / exact.norm()) < 0.05
