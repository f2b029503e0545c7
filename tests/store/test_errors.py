"""Full disks, forbidden places, foreign things, several processes: clear errors, and the store opens."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.store import Layout, create_store, objects, open_store, verify_store, write_block
from tests.torture import BLOCK, WEIGHTS, N, contents, fill

FORK: Any = multiprocessing.get_context("fork")


def begin(path: Any, n: int = 8) -> rs.SketchStore:
    return create_store(
        path,
        shape=(n, 1, 4096),
        ids=np.arange(n),
        weights={"c": 1.0},
        fingerprint={},
        dtype="float32",
        quantities=(),
        layout=Layout(4),
    )


def write(store: rs.SketchStore, block: int) -> None:
    write_block(store, "c", block, np.ones((4, 1, 4096), np.float32), np.ones((4, 1), np.float32))


def test_a_full_disk_is_told_and_what_was_committed_stands(tmp_path: Path) -> None:
    store = begin(tmp_path / "s")
    write(store, 0)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a write beyond 10 kB fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"block 1 of checkpoint 'c' could not be written .*committed before stands"):
            write(store, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert open_store(tmp_path / "s").committed("c").tolist() == [True, False]
    write(store, 1)
    assert verify_store(tmp_path / "s").is_whole


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_forbidden_place_is_told(tmp_path: Path) -> None:
    store = begin(tmp_path / "s")
    write(store, 0)
    for folder in [tmp_path / "s", *(tmp_path / "s").rglob("*"), *tmp_path.parents[:2]]:
        folder.chmod(0o755 if folder.is_dir() else 0o644)

    def as_nobody(result: Any) -> None:
        os.setuid(65534)
        attempts: dict[str, Callable[[], Any]] = {
            "write": lambda: write(store, 1),
            "delete": lambda: store.delete([1]),
            "create": lambda: begin(tmp_path / "s2"),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
            except OSError as error:
                result.send((name, type(error).__name__, str(error)))

    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=as_nobody, args=(there,))
    child.start()
    child.join()
    there.close()
    told = [here.recv() for _ in range(3)]
    assert [name for name, *_ in told] == ["write", "delete", "create"]
    assert {kind for _, kind, _ in told} == {"PermissionError"}
    assert open_store(tmp_path / "s").committed("c").tolist() == [True, False]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_store_is_written_below_a_folder_that_can_be_entered_but_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "s")
    forced = objects.force

    def force(path: Any) -> None:  # as for a user whom the folder's mode, 711, does not let read it
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        forced(path)

    monkeypatch.setattr(objects, "force", force)
    write(open_store(tmp_path / "s", mode="r+"), 1)
    objects.force_all(objects.place_of(str(tmp_path / "s")))
    assert open_store(tmp_path / "s").committed("c").tolist() == [False, True]


def test_an_interruption_leaves_no_file_that_was_begun(tmp_path: Path) -> None:
    def pieces() -> Iterator[Any]:
        yield np.zeros(8, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objects.write_all(objects.place_of(str(tmp_path)), {"a": b"1", "b": pieces()})
    assert not list(tmp_path.iterdir())


def test_a_store_opened_for_reading_is_not_written(tmp_path: Path) -> None:
    write(begin(tmp_path / "s"), 0)
    with pytest.raises(PermissionError, match=r"open it with mode='r\+'"):
        write(open_store(tmp_path / "s"), 1)


@pytest.mark.parametrize("verb", [open_store, verify_store])
def test_a_file_and_an_empty_folder_are_no_store(tmp_path: Path, verb: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_text("not a store")
    (tmp_path / "folder").mkdir()
    for path in ("file", "folder"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            verb(tmp_path / path)


@pytest.mark.parametrize("verb", [begin, rs.StoreWriter])
def test_no_store_is_begun_on_a_file_or_below_one(tmp_path: Path, verb: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_text("not a store")
    with pytest.raises(ValueError, match="file is a file; choose another path"):
        verb(tmp_path / "file")
    with pytest.raises(ValueError, match="file/s is below a file; choose another path"):
        verb(tmp_path / "file" / "s")
    with pytest.raises(FileNotFoundError, match="file is a file and no sketch store; choose another path"):
        open_store(tmp_path / "file", mode="r+")


def test_processes_that_race_for_the_same_blocks_leave_the_same_store(tmp_path: Path) -> None:
    fill(tmp_path / "alone")
    racers = [FORK.Process(target=fill, args=(tmp_path / "raced",)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert contents(tmp_path / "raced") == contents(tmp_path / "alone")


def test_a_reader_sees_committed_blocks_only_while_they_are_written(tmp_path: Path) -> None:
    fill(tmp_path / "alone")
    expected = open_store(tmp_path / "alone").sketches("b")
    writer = FORK.Process(target=fill, args=(tmp_path / "s",))
    writer.start()
    seen: set[int] = set()
    while writer.is_alive() or len(seen) < len(range(0, N, BLOCK)):
        try:
            store = open_store(tmp_path / "s")
        except (FileNotFoundError, ValueError):  # not begun yet
            continue
        for block in np.flatnonzero(store.committed("b")).tolist():
            samples = store.blocks[block]
            np.testing.assert_array_equal(store.sketches("b", samples), expected[samples])
            seen.add(block)
    writer.join()
    assert writer.exitcode == 0
    assert open_store(tmp_path / "s").checkpoints == list(WEIGHTS)


def test_the_command_line_tells_damage_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "s")
    damaged = tmp_path / "s" / "b" / "scale" / "c" / "3" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["verify", str(tmp_path / "s")]) == 1
    assert main(["verify", str(tmp_path / "s"), "--repair"]) == 3
    told = capsys.readouterr().out
    assert "checkpoint b, samples 12 .. 15: b/scale/c/3/0: is damaged" in told
    assert "repaired; 1 blocks to be written" in told
    fill(tmp_path / "s")
    assert main(["verify", str(tmp_path / "s")]) == 0
    assert main(["info", str(tmp_path / "s")]) == 0
    assert "280 of 280 pairs" in capsys.readouterr().out


def test_a_checkpoint_whose_name_zarr_would_change_is_refused_and_one_that_is_no_string() -> None:
    with pytest.raises(ValueError, match="a checkpoint cannot be called"):
        rs.write_store(None, {"runs\\last": np.ones((1, 1, 4))})
    names: Any = {1: np.ones((1, 1, 4))}
    with pytest.raises(ValueError, match="a checkpoint is called 1, which is no string"):
        rs.write_store(None, names)


def test_a_column_may_have_missing_numbers_and_still_be_the_same(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "shape": (2, 1, 4),
        "ids": np.arange(2),
        "weights": {"a": 1.0},
        "fingerprint": {},
        "dtype": "int8",
    }
    columns = {"year": np.array([1990, np.nan])}
    for _ in range(2):
        store = create_store(tmp_path / "s", **common, columns=columns)
    np.testing.assert_array_equal(store.columns["year"], columns["year"])
    with pytest.raises(ValueError, match="column 'year' differs"):
        create_store(tmp_path / "s", **common, columns={"year": np.array([np.nan, 1990])})
