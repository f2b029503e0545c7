"""Commit records: which blocks are written, and the checksums of what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.mapping import CRC_BYTES, crc32c

SEAL = "seal"


def commit_key(checkpoint: str, block: int) -> str:
    """Where the record of a block is kept: one chunk of the array `commit [block, entry]`."""
    return f"{checkpoint}/commit/c.{block}.0"


def aside_key(checkpoint: str, block: int) -> str:
    """Where the record of a block is kept while the block is computed again."""
    return f"{checkpoint}/commit/was.{block}"


def pack(store_digest: str, checkpoint: str, block: int, checksums: Mapping[str, int]) -> bytes:
    """The chunk that records a block: its seal, the checksums of its chunks, and the chunk's own CRC-32C."""
    values = list(checksums.values())
    row = np.array([_seal(store_digest, checkpoint, block, values), *values], "<u4")
    return row.tobytes() + crc32c(row).to_bytes(CRC_BYTES, "little")


def unpack(chunk: bytes, store_digest: str, checkpoint: str, block: int, quantities: Sequence[str]) -> dict[str, int]:
    """The checksums that a record carries, by quantity.

    Raises:
        DamagedStoreError: it is damaged, or it is the record of another block or store.
    """
    place = f"the commit record of checkpoint {checkpoint!r}, block {block}, {commit_key(checkpoint, block)},"
    size = 4 * (1 + len(quantities))
    if len(chunk) != size + CRC_BYTES:
        raise DamagedStoreError(f"{place} has {len(chunk)} bytes instead of {size + CRC_BYTES}.")
    row = np.frombuffer(chunk[:size], "<u4")
    if crc32c(row).to_bytes(CRC_BYTES, "little") != chunk[size:]:
        raise DamagedStoreError(f"{place} fails its checksum.")
    values = [int(value) for value in row[1:]]
    if row[0] != _seal(store_digest, checkpoint, block, values):
        raise DamagedStoreError(f"{place} belongs to another block or store.")
    return dict(zip(quantities, values, strict=True))


def _seal(store_digest: str, checkpoint: str, block: int, checksums: Sequence[int]) -> int:
    """CRC-32C of the record's place and content, so that it cannot stand for another block."""
    text = f"{store_digest}/{checkpoint}/{block}"
    return crc32c(np.frombuffer(text.encode() + np.array(checksums, "<u4").tobytes(), np.uint8))
