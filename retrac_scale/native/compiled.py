"""Compiled passes over the rows of an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

AHEAD, LINE = 3072, 64
"""Bytes from what a pass works on to what it has fetched meanwhile, and of a cache line."""

_features = binding.get_host_cpu_features()

STRETCH = 256
"""Entries that a pass works on between prefetches."""


def has(feature: str) -> bool:
    """Whether compiled code is for a CPU with a feature of LLVM's: this one, or what NUMBA_CPU_FEATURES says of it."""
    told = numba.config.CPU_FEATURES
    return f"+{feature}" in told.split(",") if told is not None else bool(_features.get(feature))


def compiled(function: Function, *, reassociate: bool = False) -> Any:
    """The function as machine code that releases the interpreter's lock, kept on disk for the next process.

    Args:
        function: on arrays and numbers, with the division of IEEE 754. What is kept is renewed when the function's own
            file changes, not for those of functions that it calls.
        reassociate: let it add up in any order, by the widest instructions there are.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"} if reassociate else False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(**options)(function)


def fetch(builder: Any, address: Any, nearest: int = 1) -> None:
    """Among the instructions of an intrinsic: have the cache line at an address fetched, into a cache and those beyond.

    Args:
        builder: LLVM's.
        address: 64 bits, which need not be valid.
        nearest: the cache, by its number.
    """
    pointer, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, locality, data = number(0), number(4 - nearest), number(1)
    builder.call(function, [builder.inttoptr(address, pointer), read, locality, data])


def _prefetching(nearest: int, doc: str) -> Any:
    def prefetch(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            fetch(builder, arguments[0], nearest)
            return context.get_dummy_value()

        return types.void(types.intp), generate

    prefetch.__doc__ = doc
    return intrinsic(prefetch)


prefetch = _prefetching(
    1, "In a compiled function: have the cache line at an address fetched, which need not be valid."
)
prefetch_beyond = _prefetching(2, "The same, but not into the nearest cache, for what is used later.")
