"""What every compiled pass computes, by NumPy in float64, a sample at a time and with nothing tuned.

`pytest --plain` runs any test with these in place of the compiled passes: what fails either way is not their fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from retrac_scale.gradients import factored
from retrac_scale.gradients.mixing import mix
from retrac_scale.gradients.rules import normalization
from retrac_scale.index import kernels, plain
from retrac_scale.native import amx, int8, paired, products, texts
from retrac_scale.native.threads import SharedPass, over_rows
from retrac_scale.projections import folding
from retrac_scale.store import rounding


def form(sides: Any, out: Any, first: int, last: int) -> None:
    """See `factored._form`."""
    for sample in range(first, last):
        out[sample] = gradient_of(sides, sample)


def form_and_fold(sides: Any, accumulator: Any, signs: Any, scale: Any, squares: Any, first: int, last: int) -> None:
    """See `folding._form_and_fold`."""
    of_weight, of_bias = signs
    for sample in range(first, last):
        some = slice(sample, sample + 1)
        formed = gradient_of(sides, sample).astype(np.float32)
        fold(accumulator[some], formed.reshape(1, -1), of_weight, scale, squares[some])
        if len(of_bias[0]):
            sums = side_of(sides[0], sample).sum((0, 2)).astype(np.float32)
            fold(accumulator[some], sums[None], of_bias, np.float32(1), squares[some])


def gradient_of(sides: Any, sample: int) -> Any:
    """Of `FactoredGradients.sides`, one sample's gradient `[o, k, i]`."""
    left, right, pairs, mixer = sides
    grad, x = side_of(left, sample), side_of(right, sample)
    of_places = [
        np.einsum("fop,fip->oi", grad[:, :, meets[:count]], x[:, :, met[:count]])
        for meets, met, count in zip(*pairs, strict=True)
    ]
    whole = np.stack(of_places, 1)
    if not len(mixer):
        return whole
    given = torch.from_numpy(whole).movedim(2, 1)[None]
    return mix(torch.from_numpy(mixer).double(), given)[0].movedim(1, 2).numpy()


def side_of(side: Any, sample: int) -> Any:
    """`[f, o, p]`."""
    entries, (apart, *steps), shape = side
    return as_strided(entries[sample * apart :], shape, [entries.itemsize * step for step in steps]).astype(np.float64)


def fold(accumulator: Any, entries: Any, signs: Any, scale: Any, squares: Any) -> None:
    """See `folding._fold`."""
    signs, shifts = signs
    k = accumulator.shape[1] // 2
    if entries.dtype == np.int16:  # bits of bfloat16
        entries = (entries.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    entries = entries.astype(np.float64)
    squares += np.square(entries).sum(1)
    for block, shift in enumerate(shifts):
        some = slice(block * k, (block + 1) * k)
        piece = scale * signs[some] * entries[:, some]
        accumulator[:, shift : shift + piece.shape[1]] += piece


def to_int8(rows: Any, stored: Any, scale: Any) -> None:
    """See `rounding._to_int8`."""
    step = np.abs(rows).max(1, initial=0) / np.float32(127)
    faint = step < rounding.FAINTEST
    scale[:] = np.where(faint, 0, step)
    with np.errstate(all="ignore"):
        stored[:] = np.where(faint[:, None], 0, np.rint(rows / step[:, None]))


def sums(x: Any, grad: Any, product: Any, total: Any) -> None:
    """See `normalization._sum`."""
    product[:], total[:] = np.einsum("nop,nop->no", x, grad, dtype=np.float64), grad.sum(2, dtype=np.float64)


def back(
    x: Any,
    grad: Any,
    product: Any,
    total: Any,
    mean: Any,
    rstd: Any,
    out: Any,
    weight: Any,
    last: Any,
    first: Any,
    stop: Any,
) -> None:
    """See `normalization._back`."""
    x, grad, product, total, mean, rstd, out = (each[first:stop] for each in (x, grad, product, total, mean, rstd, out))
    if last:
        x, grad, out = (each.swapaxes(1, 2) for each in (x, grad, out))
    sums(x, grad, product, total)
    n, groups = mean.shape
    mean, rstd = (each.astype(np.float64)[:, :, None, None] for each in (mean, rstd))
    shape = n, groups, x.shape[1] // groups, x.shape[2]
    normal, given = (each.reshape(shape) for each in (x, grad * weight[:, None]))
    normal = (normal - mean) * rstd
    along, level = (each.mean((2, 3), keepdims=True) for each in (given * normal, given.astype(np.float64)))
    out[:] = (rstd * (given - level - normal * along)).reshape(x.shape)


def channels_last(plain_pass: Callable[..., None], images: tuple[int, ...]) -> Callable[..., None]:
    """A pass over `[n, o, p]`, for arguments of which some are `[n, p, o]`."""

    def run(*arguments: Any) -> None:
        plain_pass(*(each.swapaxes(1, 2) if place in images else each for place, each in enumerate(arguments)))

    return run


def dot(rows: Any, query: Any, scale: Any, unit: Any, out: Any) -> None:
    """See `kernels.dot`."""
    out[:] = (rows.astype(np.int64) @ query.astype(np.int64)).astype(np.float32) * unit * scale


def multiply_integers(rows: Any, queries: Any, scale: Any, unit: Any, out: Any) -> None:
    """See `products.multiply_integers`."""
    whole = rows.astype(np.float64) @ queries.T.astype(np.float64)  # exact
    out[:] = whole.astype(np.float32) * unit * scale[:, None]


def multiply_several(rows: Any, queries: Any, rest: Any, scale: Any, unit: Any, out: Any) -> None:
    """See `int8.multiply_several`."""
    multiply_integers(rows, np.concatenate([unpacked(queries, len(rest)) - int8.SHIFT, rest], 1), scale, unit, out)


def multiply_paired(rows: Any, queries: Any, rest: Any, sums: Any, scale: Any, unit: Any, out: Any) -> None:
    """See `paired.multiply_paired`."""
    multiply_integers(rows, np.concatenate([unpacked(queries, len(rest)), rest], 1), scale, unit, out)


def multiply_pieces(rows: Any, queries: Any, scale: Any, unit: Any, out: Any) -> None:
    """See `amx.multiply_pieces`."""
    q, k = out.shape[1], rows.shape[1]
    multiply_integers(rows, unpacked(queries, q)[:, :k], scale, unit[:q], out)


def unpacked(queries: Any, count: int) -> Any:
    """So many queries `[q, k]` of registers of them."""
    registers, fours, lanes, four = queries.shape
    return queries.transpose(0, 2, 1, 3).reshape(registers * lanes, fours * four)[:count].astype(np.int64)


def passing(values: Any, lowest: Any, sign: Any, counting: Any, places: Any) -> int:
    """See `kernels.passing`."""
    values = values.reshape(counting.shape)
    found = np.flatnonzero((sign * values >= lowest[: values.shape[1]]) & counting)
    places[: len(found)] = found
    return len(found)


@dataclass(frozen=True)
class Pass:
    """A compiled pass that Python calls.

    Attributes:
        compiled: the function.
        plain: computes the same.
        drawn: arguments of sizes that come with a generator of random numbers.
        written: the numbers of the arguments that are written to.
        bits: whether both give the same bits.
        here: whether this CPU has the instructions.
    """

    compiled: Any
    plain: Callable[..., Any]
    drawn: Callable[[np.random.Generator], tuple[Any, ...]]
    written: tuple[int, ...]
    bits: bool = False
    here: bool = True


def size(rng: np.random.Generator, least: int = 0) -> int:
    """Around those of registers, tiles and stretches."""
    return max(least, int(rng.choice([0, 1, 3, 4, 15, 16, 17, 33, 48, 70, 257])))


def floats(rng: np.random.Generator, *shape: int) -> Any:
    """Normal numbers, float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def sides(rng: np.random.Generator) -> tuple[Any, int]:
    """As of `FactoredGradients.sides`, and of how many samples."""
    n, frames, o, i = int(rng.integers(1, 4)), int(rng.integers(1, 3)), size(rng, 1), size(rng, 1)
    length, kernel, padding = int(rng.integers(1, 150)), int(rng.integers(1, 4)), int(rng.integers(0, 3))
    outputs = max(1, length + 2 * padding - kernel + 1)
    pairs = factored.pairs_of((kernel,), (1,), (1,), (padding,), (outputs,), (length,))
    mixer = floats(rng, 4 * int(rng.integers(1, 3)), o) if rng.random() < 0.5 else None
    orders = [rng.permutation(4) for _ in range(2)]
    left, right = (
        torch.from_numpy(floats(rng, *np.take(shape, order))).permute(*np.argsort(order).tolist())
        for shape, order in zip(((n, frames, o, outputs), (n, frames, i, length)), orders, strict=True)
    )
    return factored.FactoredGradients(
        left, right, (kernel,), pairs, mixer=None if mixer is None else torch.from_numpy(mixer)
    ).sides(), n


def to_form(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `factored._form`."""
    given, n = sides(rng)
    left, right, pairs, mixer = given
    return given, floats(rng, n, len(mixer) or left[2][1], len(pairs[0]), right[2][1]), int(rng.integers(0, n + 1)), n


def signs(rng: np.random.Generator, entries: int, k: int) -> tuple[Any, Any]:
    """Of so many entries, folded to k."""
    return rng.choice(np.array([-1, 1], np.int8), entries), rng.integers(0, k, -(-entries // k))


def to_form_and_fold(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `folding._form_and_fold`."""
    given, formed, first, n = to_form(rng)
    k, o = size(rng, 1), given[0][2][1]
    of_bias = signs(rng, o if rng.random() < 0.5 else 0, k)
    both = signs(rng, formed[0].size, k), of_bias
    return given, floats(rng, n, 2 * k), both, np.float32(0.5), rng.random(n), first, n


def to_fold(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `folding._fold`, of float32 or bfloat16."""
    n, entries, k = int(rng.integers(0, 4)), 11 * size(rng), size(rng, 1)
    given = floats(rng, n, entries)
    if rng.random() < 0.5:
        given = torch.from_numpy(given).bfloat16().view(torch.int16).numpy()
    return floats(rng, n, 2 * k), given, signs(rng, entries, k), np.float32(2), rng.random(n)


def to_round(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `rounding._to_int8`, some rows of them faint or zeros."""
    n, k = int(rng.integers(0, 4)), size(rng)
    rows = floats(rng, n, k) * rng.choice(np.array([0, 1e-43, 1e-9, 1e30], np.float32), (n, 1))
    return rows, np.ones((n, k), np.int8), floats(rng, n)


def to_sum(last: bool) -> Callable[[np.random.Generator], tuple[Any, ...]]:
    """For `normalization._sum`, or for channels last."""

    def drawn(rng: np.random.Generator) -> tuple[Any, ...]:
        n, o, p = int(rng.integers(0, 4)), size(rng), size(rng)
        shape = (n, p, o) if last else (n, o, p)
        return floats(rng, *shape), floats(rng, *shape), *np.zeros((2, n, o), np.float32)

    return drawn


def to_back(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `normalization._back`."""
    n, groups, each, p, last = (
        int(rng.integers(0, 4)),
        int(rng.integers(1, 5)),
        size(rng, 1),
        size(rng, 3),
        bool(rng.integers(2)),
    )
    x, grad = floats(rng, 2, n, *((p, groups * each) if last else (groups * each, p)))
    parts = (x.swapaxes(1, 2) if last else x).reshape(n, groups, each * p)
    statistics = parts.mean(2), 1 / np.sqrt(parts.var(2) + 1e-3)
    written = *np.zeros((2, n, groups * each), np.float32), *statistics, np.zeros_like(x)
    return x, grad, *written, floats(rng, groups * each), last, int(rng.integers(0, n + 1)), n


def to_multiply(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `kernels.multiply`."""
    n, q, k, s = size(rng, 1), size(rng, 1), size(rng), size(rng)
    rows = integers(rng, n, k) if rng.random() < 0.5 else floats(rng, n, k)
    return rows, rng.integers(0, n, s), rng.standard_normal((q, k)), rng.integers(0, q, s), np.empty(s)


def integers(rng: np.random.Generator, *shape: int) -> Any:
    """Entries of int8 rows."""
    return rng.integers(-127, 128, shape, np.int8)


def to_products(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `products.multiply_integers`."""
    n, q, k = size(rng), size(rng), size(rng)
    queries = rng.integers(-900, 901, (q, k), np.int16)
    return integers(rng, n, k), queries, floats(rng, n), floats(rng, q), np.empty((n, q), np.float32)


def to_bytes(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `int8.multiply_several`."""
    n, q, k = size(rng), size(rng), size(rng)
    queries = int8.packed(rng.integers(-128, 128, (q, k), np.int8))
    return integers(rng, n, k), *queries, floats(rng, n), floats(rng, q), np.empty((n, q), np.float32)


def to_pieces(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `amx.multiply_pieces`."""
    n, q, k = size(rng), size(rng), size(rng)
    queries = amx.packed(integers(rng, q, k))
    return integers(rng, n, k), queries, floats(rng, n), floats(rng, q + -q % amx.SIDE), np.empty((n, q), np.float32)


def to_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `paired.multiply_paired`."""
    n, q, k = size(rng), size(rng), size(rng)
    queries = paired.packed(rng.integers(-paired.MOST // 4, paired.MOST // 4 + 1, (q, k), np.int8))
    return integers(rng, n, k), *queries, floats(rng, n), floats(rng, q), np.empty((n, q), np.float32)


def to_byte(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `int8.multiply_one`."""
    rows, _, scale, unit, out = to_dot(rng)
    return rows, rng.integers(-128, 128, rows.shape[1], np.int8), scale, unit, out


def to_passing(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `kernels.passing`."""
    n, q = size(rng), size(rng)
    counting = np.broadcast_to(rng.random((n, q if rng.random() < 0.5 else 1)) < 0.8, (n, q))
    values, lowest = floats(rng, n * q), np.resize(0.5 * floats(rng, q) + np.float32(1.5), q + plain.SUMS)
    return values, lowest, np.float32(rng.choice([-1, 1])), counting, np.zeros(n * q, np.int64)


def bounded(
    places: Any,
    values: Any,
    unit: Any,
    norm: Any,
    error: Any,
    faint: Any,
    rows: Any,
    queries: Any,
    found: Any,
    bound: Any,
) -> None:
    """See `kernels.bounded`."""
    values = values.reshape(-1, len(unit))
    rows[:], queries[:], found[:], bound[:] = plain.bounded(places, values, unit, norm, error, faint)


def to_bounded(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `kernels.bounded`."""
    n, q, c = size(rng, 1), size(rng, 1), int(rng.integers(1, 4))
    places = np.flatnonzero(rng.random(n * q) < 0.2)
    values, norm = floats(rng, n * q), floats(rng, c, n)
    given = places, values, rng.standard_normal(q), norm, rng.random((c, q)), rng.random(q)
    return (*given, *np.zeros((2, len(places)), np.int64), *np.zeros((2, len(places))))


def keep_largest(largest: Any, lanes: Any, values: Any, floor: Any) -> None:
    """See `kernels.keep_largest`."""
    for lane, value in zip(lanes, values, strict=True):
        if value > floor[lane]:
            largest[lane] = sorted([*largest[lane], value])[1:]
            floor[lane] = max(floor[lane], largest[lane, 0])


def to_keep(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `kernels.keep_largest`."""
    count, s = size(rng, 1), 8 * size(rng)
    floor = np.where(rng.random(count) < 0.5, -np.inf, 0.0)
    return np.full((count, size(rng, 1)), -np.inf), rng.integers(count, size=s), rng.standard_normal(s), floor


def to_dot(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `kernels.dot`."""
    n, k = size(rng), size(rng)
    query = rng.integers(-900, 901, k, np.int16)
    return integers(rng, n, k), query, floats(rng, n), np.float32(0.3), np.empty(n, np.float32)


def merge(text: Any, ends: Any, others: Any, other_ends: Any, out: Any) -> None:
    """See `texts.merge`."""
    theirs = texts_of(others, other_ends)
    for number, one in enumerate(texts_of(text, ends)):
        out[number] = 2 * sum(other < one for other in theirs) - (one not in theirs)


def texts_of(content: Any, ends: Any) -> list[bytes]:
    """One after the other."""
    return [content[start:stop].tobytes() for start, stop in zip([0, *ends], ends, strict=False)]


def to_merge(rng: np.random.Generator) -> tuple[Any, ...]:
    """For `texts.merge`: short texts of few letters, so that many are on both sides or begin alike."""
    sides: list[Any] = []
    for _ in range(2):
        drawn = sorted({rng.choice([0, 97, 255], rng.integers(4)).astype(np.uint8).tobytes() for _ in range(size(rng))})
        sides += [np.frombuffer(b"".join(drawn), np.uint8), np.cumsum([len(one) for one in drawn], dtype=np.int64)]
    return (*sides, np.empty(len(sides[1]), np.int64))


PASSES = (
    Pass(factored._form, form, to_form, (1,)),
    Pass(folding._form_and_fold, form_and_fold, to_form_and_fold, (1, 4)),
    Pass(folding._fold, fold, to_fold, (0, 4)),
    Pass(rounding._to_int8, to_int8, to_round, (1, 2), bits=True),
    Pass(normalization._sum, sums, to_sum(last=False), (2, 3)),
    Pass(normalization._sum_channels_last, channels_last(sums, (0, 1)), to_sum(last=True), (2, 3)),
    Pass(normalization._back, back, to_back, (2, 3, 6)),
    Pass(kernels.dot, dot, to_dot, (4,), bits=True),
    Pass(kernels.multiply, plain.multiply, to_multiply, (4,), bits=True),
    Pass(kernels.passing, passing, to_passing, (4,), bits=True),
    Pass(kernels.bounded, bounded, to_bounded, (6, 7, 8, 9)),
    Pass(kernels.keep_largest, keep_largest, to_keep, (3,), bits=True),
    Pass(products.multiply_integers, multiply_integers, to_products, (4,)),
    Pass(int8.multiply_one, dot, to_byte, (4,), here=int8.AVAILABLE),
    Pass(int8.multiply_several, multiply_several, to_bytes, (5,), here=int8.AVAILABLE),
    Pass(amx.multiply_pieces, multiply_pieces, to_pieces, (4,), here=amx.AVAILABLE),
    Pass(paired.multiply_paired, multiply_paired, to_pairs, (6,), here=paired.AVAILABLE),
    Pass(texts.merge, merge, to_merge, (4,), bits=True),
)
"""All of them: a test finds one that is missing."""


def put_in_place() -> None:
    """Have the package call the references, in this process."""
    of_compiled = {id(each.compiled): each.plain for each in PASSES}
    for module in [module for name, module in sys.modules.items() if name.startswith("retrac_scale.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, SharedPass):
                setattr(module, name, _by_rows(of_compiled[id(value._work)]))
            elif id(value) in of_compiled:
                setattr(module, name, of_compiled[id(value)])


def _by_rows(plain_pass: Callable[..., None]) -> Callable[..., None]:
    def run(arguments: tuple[Any, ...], rows: int, nbytes: int) -> None:
        over_rows(lambda part: plain_pass(*arguments, part.start, part.stop), rows, nbytes)

    return run
