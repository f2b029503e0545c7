"""Passes over the rows of an array, in as many threads as torch uses, and where possible in torch's own.

Threads of another pool would compete with torch's, which go on spinning for a while after their work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

THREAD_BYTES, SHARED_BYTES = 1 << 20, 1 << 18
"""What a thread must have to do to be worth waking, where it waits for the interpreter's lock and where it does not."""


def over_rows(work: Callable[[slice], None], rows: int, nbytes: int) -> None:
    """Call `work` on slices that make up 0 .. rows.

    Args:
        work: gets a slice of rows; a compiled pass over them.
        rows: how many there are.
        nbytes: of all of them.
    """
    threads = _threads(rows, nbytes // THREAD_BYTES)
    if threads == 1:
        work(slice(0, rows))
        return
    cuts = [rows * thread // threads for thread in range(threads + 1)]
    parts = list(map(slice, cuts[:-1], cuts[1:]))
    if (team := _torch_team()) is None:
        list(_pool(os.getpid()).map(work, parts))
        return
    queue, errors = iter(parts), []

    def member(_: int) -> None:
        try:
            for part in queue:
                work(part)
        except BaseException as error:  # would be printed and forgotten
            errors.append(error)

    team(_Member(member), None, threads, 0)
    if errors:
        raise errors[0]


class Shared:
    """The arguments of a compiled pass, for threads that do not wait for the interpreter's lock.

    Waiting costs each thread about 0.1 ms, which is what a small layer takes. A pass that is shared so needs two
    functions in its own module, for numba to keep them on disk:

        shared = Shared(example)
        run, taken, after = shared.run, shared.taken, shared.after

        def member(address):
            count, parts, rows, arguments = taken(address)
            part = after(count)
            while part < parts:
                work(*arguments, rows * part // parts, rows * (part + 1) // parts)
                after(count + 8)
                part = after(count)

        @compiled
        def share(team, member, count, parts, rows, arguments):
            run(team, member, (count, parts, rows, arguments))

    Args:
        example: arguments, of the types that all arguments will have.
    """

    def __init__(self, example: tuple[Any, ...]) -> None:
        kind = types.Tuple((types.intp, types.intp, types.intp, numba.typeof(example)))

        @intrinsic  # type: ignore[untyped-decorator]
        def run(typing: Any, team: Any, member: Any, shared: Any) -> Any:
            """Have the threads of a team, of which there are as many as parts, call a member; addresses both."""

            def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                team, member, shared = given
                pointer, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
                function = ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number])
                address = builder.bitcast(cgutils.alloca_once_value(builder, shared), pointer)
                threads = builder.trunc(builder.extract_value(shared, 1), number)
                call = builder.inttoptr(team, function.as_pointer())
                builder.call(call, [builder.inttoptr(member, pointer), address, threads, number(0)])
                return context.get_dummy_value()

            return types.void(types.intp, types.intp, kind), generate

        @intrinsic  # type: ignore[untyped-decorator]
        def taken(typing: Any, address: Any) -> Any:
            """What is shared."""

            def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                shared = builder.load(builder.bitcast(given[0], context.get_value_type(kind).as_pointer()))
                context.nrt.incref(builder, kind, shared)
                return shared

            return kind(types.voidptr), generate

        self.run, self.taken, self.after = run, taken, _after


@intrinsic  # type: ignore[untyped-decorator]
def _after(typing: Any, count: Any) -> Any:
    """The number at an address, which is one more for whoever asks next."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(given[0], number.as_pointer()), number(1), "monotonic")

    return types.intp(types.intp), generate


class SharedPass:
    """A compiled pass over rows; see `Shared`.

    Args:
        work: called with the arguments, the first row and the one after the last.
        share: see `Shared`.
        member: see `Shared`.
    """

    def __init__(self, work: Any, share: Any, member: Callable[[Any], None]) -> None:
        self._work, self._share, self._member = work, share, member
        self._compiled: Any = None

    def __call__(self, arguments: tuple[Any, ...], rows: int, nbytes: int) -> None:
        """Do all rows; `nbytes` as of `over_rows`."""
        threads, team = _threads(rows, nbytes // SHARED_BYTES), _torch_team()
        if threads == 1:
            self._work(*arguments, 0, rows)
            return
        if team is None:
            over_rows(lambda part: self._work(*arguments, part.start, part.stop), rows, nbytes)
            return
        if self._compiled is None:
            self._compiled = numba.cfunc(types.void(types.voidptr), cache=True)(self._member)
        count = np.zeros(2, np.int64)  # parts begun, parts done
        address = ctypes.cast(team, ctypes.c_void_p).value
        self._share(address, self._compiled.address, count.ctypes.data, threads, rows, arguments)
        if count[1] < threads:  # an error cannot leave a thread that the interpreter does not know
            raise MemoryError(
                f"{threads - count[1]} of {threads} threads could not do their rows; give a smaller batch."
            )


def _threads(rows: int, most: int) -> int:
    import torch  # takes seconds, which reading has no use for

    return max(1, min(torch.get_num_threads(), rows, most))


_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_process = os.getpid()


def _torch_team() -> Any:
    """What runs a function in each of torch's threads; None if they are not OpenMP's, or those of a process forked."""
    return _openmp() if os.getpid() == _process else None


@cache
def _openmp() -> Any:
    import torch

    try:
        team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    team.argtypes, team.restype = (_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rows")
