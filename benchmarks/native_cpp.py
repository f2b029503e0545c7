"""Tiles and folds in C++ against the compiled passes of the package, on the same inputs, one thread.

    python -m benchmarks.native_cpp                                        # this machine's registers
    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+bmi,+bmi2 python -m benchmarks.native_cpp

Needs g++. Both work in turns; least CPU time of many, after comparing what they compute.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement_page import cpu_name
from retrac_scale.gradients import tiles
from retrac_scale.gradients.factored import pairs_of
from retrac_scale.projections import folding

SOURCE = Path(__file__).parent / "tiles.cpp"
MACHINES = {16: "native", 8: "haswell", 4: "x86-64"}
"""g++'s -march for so many lanes."""
FLAGS = (
    "-std=c++17 -O3 -fno-math-errno -fassociative-math -fno-signed-zeros -fno-trapping-math -shared -fPIC "
    "-funroll-loops -fvariable-expansion-in-unroller --param max-variable-expansions-in-unroller=4"
)
TURNS = 60

Way = Callable[[], Any]


def built(folder: Path) -> tuple[Any, float]:
    """The library, and the seconds that it took to compile."""
    started = time.perf_counter()
    wide = ["-mprefer-vector-width=512"] if tiles.LANES == 16 else []
    flags = [*FLAGS.split(), *wide, f"-march={MACHINES[tiles.LANES]}", f"-DBYTES={4 * tiles.LANES}"]
    subprocess.run(["g++", *flags, SOURCE, "-o", folder / "tiles.so"], check=True)
    library = ctypes.CDLL(str(folder / "tiles.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.add_products.argtypes = [pointer, number, number, pointer, number, *[pointer] * 3, number, pointer]
    library.add_products.argtypes += [number] * 3
    library.fold.argtypes = [pointer, number, pointer, number, pointer, pointer, ctypes.c_float]
    library.fold.restype = ctypes.c_double
    return library, time.perf_counter() - started


def products(library: Any, o: int, i: int, side: int, kernel: int) -> tuple[Way, Way, Any]:
    """Weight gradients of one sample, both sides positions first; what they are written to."""
    rng = np.random.default_rng(0)
    pad = kernel // 2
    pairs = pairs_of((kernel,) * 2, (1, 1), (1, 1), (pad,) * 2, (side,) * 2, (side,) * 2)
    left, right = (rng.standard_normal(side**2 * size, dtype=np.float32) for size in (o, i))
    out = np.empty((o, kernel**2, i), np.float32)
    addresses = [array.ctypes.data for array in (left, right, *pairs, out)]

    def in_cpp() -> None:
        g, x, meets, met, counts, to = addresses
        library.add_products(g, 1, o, x, i, meets, met, counts, side**2, to, o, kernel**2, i)

    return lambda: tiles.add_products(left, 1, o, right, i, pairs, out, 1, 0, 0), in_cpp, out


def folds(library: Any, entries: int, k: int) -> tuple[Way, Way, Any]:
    """Of one sample's entries, float32."""
    rng = np.random.default_rng(0)
    given, signs = rng.standard_normal((1, entries), dtype=np.float32), rng.choice(np.array([-1, 1], np.int8), entries)
    shifts, sums, squares = rng.integers(0, k, -(-entries // k)), np.zeros((1, 2 * k), np.float32), np.zeros(1)

    def ours() -> None:
        folding._fold(sums, given, (signs, shifts), np.float32(1), squares)

    to, of_entries, of_signs, of_shifts = (array.ctypes.data for array in (sums, given, signs, shifts))

    def in_cpp() -> None:
        library.fold(to, k, of_entries, entries, of_signs, of_shifts, 1)

    return ours, in_cpp, sums


def compared(ours: Way, other: Way, out: Any) -> tuple[float, float]:
    """Least milliseconds of CPU time of both."""
    results = []
    for way in (ours, other):
        out[:] = 0
        way()
        results.append(out.copy())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-3)
    least = [float("inf")] * 2
    for _ in range(TURNS):
        for number, way in enumerate((ours, other)):
            started = time.process_time()
            for _ in range(8):
                way()
            least[number] = min(least[number], (time.process_time() - started) / 8)
    return 1000 * least[0], 1000 * least[1]


def lines() -> Iterator[tuple[str, int, int]]:
    """Lines of code of both, by what they are of; without docstrings, comments and blank lines."""
    text = SOURCE.read_text()
    pairs = {"tile": tiles._add_tile._defn, "products": tiles.add_products, "fold": folding._fold_from}
    for name, function in pairs.items():
        code = ast.parse(inspect.getsource(function)).body[0]
        assert isinstance(code, ast.FunctionDef)
        nested = [node for node in ast.walk(code) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
        of_docs = sum(int(node.body[0].end_lineno or 0) - node.body[0].lineno + 1 for node in nested)
        theirs = text.split(f"// begin {name}\n")[1].split(f"// end {name}")[0]
        yield name, int(code.end_lineno or 0) - of_docs, theirs.count("\n")


def main() -> None:
    """See the module."""
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f}; {tiles.LANES} lanes, -march={MACHINES[tiles.LANES]}")
    with tempfile.TemporaryDirectory() as folder:
        library, seconds = built(Path(folder))
        print(f"g++ takes {seconds:.1f} s, the library has {os.path.getsize(Path(folder) / 'tiles.so') // 1024} KiB")
        for name, ways in {
            "linear layer 128 x 128, 256 positions": products(library, 128, 128, 16, 1),
            "linear layer 320 x 1280, 64 positions": products(library, 320, 1280, 8, 1),
            "3 x 3 convolution 64 x 64, 16 x 16": products(library, 64, 64, 16, 3),
            "fold of 2^18 entries to 2048": folds(library, 2**18, 2048),
            "fold of 5000 entries to 2048": folds(library, 5000, 2048),
        }.items():
            ours, theirs = compared(*ways)
            print(f"{name}: {ours:.4f} ms, in C++ {theirs:.4f} ms, {theirs / ours:.2f} of it")
        for name, python, cpp in lines():
            print(f"{name}: {python} lines, in C++ {cpp}")


if __name__ == "__main__":
    main()
