"""Mapped chunks: the values of zarr without a copy, and nothing from a damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from retrac_scale.store import DamagedStoreError
from retrac_scale.store.mapping import crc32c, map_chunk


def make(where: Any, **options: Any) -> tuple[zarr.Array[Any], Any]:
    values = np.random.default_rng(0).integers(-127, 128, (11, 3), dtype=np.int8)
    group = zarr.open_group(where, mode="a")
    arguments = {"chunks": (4, 3), "compressors": (Crc32cCodec(),), **options}
    array = group.create_array("x", shape=(11, 3), dtype="int8", **arguments)
    array[:] = values
    return array, values


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_mapped_chunks_are_the_values_and_own_no_memory(where: str, tmp_path: Path) -> None:
    array, values = make(tmp_path if where == "disk" else zarr.storage.MemoryStore())
    for chunk in range(3):
        mapped = map_chunk(array, (chunk, 0))
        assert mapped is not None
        np.testing.assert_array_equal(mapped, values[4 * chunk : 4 * chunk + 4])
        assert not mapped.flags.owndata
        assert not mapped.flags.writeable


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_mapped_chunks_hold_no_file_open(tmp_path: Path) -> None:
    array, _ = make(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [map_chunk(array, (chunk, 0)) for chunk in range(3)]
    assert all(mapped is not None for mapped in kept)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_cannot_be_mapped_is_left_to_zarr(tmp_path: Path) -> None:
    assert map_chunk(make(tmp_path / "sharded", chunks=(2, 3), shards=(4, 3))[0], (0, 0)) is None
    assert map_chunk(make(tmp_path / "packed", compressors=(ZstdCodec(), Crc32cCodec()))[0], (0, 0)) is None


def test_missing_short_flipped_and_exchanged_chunks_are_refused(tmp_path: Path) -> None:
    array, values = make(tmp_path)
    assert map_chunk(array, (0, 0), crc32c(values[:4])) is not None
    with pytest.raises(DamagedStoreError, match="not the chunk that was committed"):
        map_chunk(array, (1, 0), crc32c(values[:4]))
    file = tmp_path / "x" / "c" / "0" / "0"
    content = file.read_bytes()
    for damaged, message in (
        (content[:-1], "has 15 bytes instead of 16"),
        (bytes([content[0] ^ 4]) + content[1:], "fails its checksum"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DamagedStoreError, match=message):
            map_chunk(array, (0, 0))
    file.unlink()
    with pytest.raises(DamagedStoreError, match="is missing"):
        map_chunk(array, (0, 0))


def test_damage_of_a_store_in_memory_is_refused() -> None:
    memory: dict[str, Any] = {}
    array, values = make(zarr.storage.MemoryStore(memory))
    with pytest.raises(DamagedStoreError, match="not the chunk that was committed"):
        map_chunk(array, (1, 0), crc32c(values[:4]))
    content = bytearray(memory["x/c/0/0"].to_bytes())
    content[0] ^= 4
    memory["x/c/0/0"] = type(memory["x/c/0/0"]).from_bytes(bytes(content))
    with pytest.raises(DamagedStoreError, match="fails its checksum"):
        map_chunk(array, (0, 0))
    del memory["x/c/0/0"]
    with pytest.raises(DamagedStoreError, match="is missing"):
        map_chunk(array, (0, 0))
