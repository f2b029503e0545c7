"""Counter-based random numbers, keyed by (seed, name), the same on every device, worker and platform."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from retrac_scale.gradients.mixing import hadamard


def _stream(seed: int, name: str, purpose: str) -> np.random.Philox:
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def signs(seed: int, name: str, count: int) -> npt.NDArray[np.float32]:
    """`count` independent signs, +1 or -1."""
    words = _stream(seed, name, "sign").random_raw((count + 63) // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def orthogonal_signs(seed: int, name: str, rows: int, columns: int, block: int) -> npt.NDArray[np.float32]:
    """Some rows of a Hadamard matrix, its columns times random signs: `[rows, columns]` of +1 and -1.

    Rows are distinct, and orthogonal if there are as many columns as the matrix has, a power of two. Products of
    different columns are uncorrelated with mean 0: Ailon and Chazelle 2009, Tropp 2011.

    Args:
        seed: see `signs`.
        name: likewise.
        rows: how many, a power of two and no more than there are columns.
        columns: how many.
        block: so many rows of the matrix, a power of two, lie in one block, in which their numbers differ in the last
            bits only. Rows are of different blocks, or evenly spaced in each: to flip the same of those bits in all of
            them gives other rows, and in all ways, the blocks, each row as often as any other.
    """
    size = 1 << (columns - 1).bit_length()
    block = min(block, size)
    words = _stream(seed, name, "row").random_raw(2 * size // block)
    blocks = np.argsort(words[: size // block], kind="stable")[:rows]
    first = block * blocks + (words[size // block :][blocks] % block).astype(np.int64)
    each = rows // len(blocks)
    numbers = first[:, None] ^ (block // each * np.arange(each))
    return signs(seed, name, columns) * hadamard(numbers.ravel(), columns)


def shifts(seed: int, name: str, count: int, below: int) -> list[int]:
    """`count` independent uniform integers in 0 .. below - 1."""
    return [int(word) % below for word in _stream(seed, name, "shift").random_raw(count)]
