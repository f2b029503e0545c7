"""Compiled passes over the rows of an array: how they are compiled, and spread over threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

AHEAD, LINE = 3072, 64
"""Bytes from what a pass works on to what it has fetched meanwhile, and of a cache line."""

STRETCH = 256
"""Entries that a pass works on between prefetches."""

THREAD_BYTES = 1 << 20
"""What a thread must have to do to be worth waking."""


def compiled(function: Function, *, reassociate: bool = False) -> Any:
    """The function as machine code that releases the interpreter's lock, kept on disk for the next process.

    Args:
        function: on arrays and numbers, with the division of IEEE 754.
        reassociate: let it add up in any order, by the widest instructions there are.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"} if reassociate else False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(**options)(function)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, address: Any) -> Any:
    """In a compiled function: have the cache line at an address fetched, which need not be a valid one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, all_levels, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, all_levels, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def over_rows(work: Callable[[slice], None], rows: int, nbytes: int) -> None:
    """Call `work` on slices that make up 0 .. rows, in as many threads as torch uses.

    Args:
        work: gets a slice of rows; a compiled pass over them.
        rows: how many there are.
        nbytes: of all of them.
    """
    threads = max(1, min(torch.get_num_threads(), rows, nbytes // THREAD_BYTES))
    if threads == 1:
        work(slice(0, rows))
        return
    cuts = [rows * thread // threads for thread in range(threads + 1)]
    parts = map(slice, cuts[:-1], cuts[1:])
    if (team := _torch_team()) is None or os.getpid() != _PROCESS:  # a fork has none of its parent's threads
        list(_pool(os.getpid()).map(work, parts))
        return
    queue, errors = iter(list(parts)), []

    def member(_: int) -> None:
        try:
            for part in queue:
                work(part)
        except BaseException as error:  # would be printed and forgotten
            errors.append(error)

    team(_Member(member), None, threads, 0)
    if errors:
        raise errors[0]


_PROCESS = os.getpid()
_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _torch_team() -> Any:
    """What runs a function in each of torch's own threads, None if they are not OpenMP's.

    Threads of another pool would compete with torch's, which go on spinning for a while after their work.
    """
    try:
        team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    team.argtypes, team.restype = (_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rows")
