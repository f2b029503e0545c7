"""What stands beside images in a folder is read to the character, or refused by its file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrac_scale.datasets import ImageFiles
from retrac_scale.datasets.metadata import CAPTIONS
from retrac_scale.task.items import PROMPT_KEYS

NAN = float("nan")


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def jsonl(*rows: Any) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def test_a_caption_may_have_lines_in_a_large_csv(tmp_path: Path) -> None:
    captions = [f"{row}\nof\n" + "many, " * 300 for row in range(1000)]  # more than a block of 1 MB
    pictures(tmp_path, "0.png", "999.png")
    rows = (f'{row}.png,"{caption}"' for row, caption in enumerate(captions))
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert ImageFiles(tmp_path).columns["text"].tolist() == [captions[0], captions[999]]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["007", "12"], ["007", "12"]),
        (["true", "false"], ["true", "false"]),
        (["12:30", "12:31"], ["12:30", "12:31"]),
        (["2020-01-02", "2020-01-03"], ["2020-01-02", "2020-01-03"]),
        (["1", "cat"], ["1", "cat"]),
        (["", ""], ["", ""]),
        (["1", "-20"], [1, -20]),
        (["1", "2.50"], [1.0, 2.5]),
        (["1e-3", "inf"], [0.001, float("inf")]),
    ],
)
def test_a_column_of_a_csv_is_numbers_or_what_stands_there(
    cells: list[str], expected: list[Any], tmp_path: Path
) -> None:
    pictures(tmp_path, "0.png", "1.png")
    rows = "".join(f"{row}.png,{cell},{cell},{cell}\n" for row, cell in enumerate(cells))
    (tmp_path / "metadata.csv").write_text(f"file_name,x,text,title\n{rows}")
    dataset = ImageFiles(tmp_path, given={"prompt": "title"})
    assert dataset.columns["x"].tolist() == expected
    assert dataset.columns["text"].tolist() == cells  # captions are never numbers
    items: list[Any] = [dataset[row] for row in range(2)]
    assert [item["prompt"] for item in items] == cells


def test_captions_are_what_tasks_take_as_prompts() -> None:
    assert CAPTIONS == PROMPT_KEYS


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "metadata.jsonl",
            jsonl({"file_name": "0.png", "x": 1}, {"file_name": "./0.png", "x": 2}),
            "two rows for 0.png",
        ),
        ("metadata.csv", "file_name,x\n0.png,1\n0.png,2\n", "two rows for 0.png"),
        ("metadata.csv", "file_name,x,x\n0.png,1,2\n", "it has two columns 'x'"),
        ("metadata.csv", "file_name,x\n0.png,1,2\n", "cannot be read: .*Expected 2 columns"),
        ("metadata.jsonl", "5", "cannot be read: a row is 5, no object"),
        ("metadata.jsonl", "{", "cannot be read: Expecting property name"),
    ],
)
def test_metadata_that_says_two_things_or_none_is_refused_by_name(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    (pictures(tmp_path, "0.png") / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} .*{message}"):
        ImageFiles(tmp_path)


@pytest.mark.parametrize("caption", ["a\u2028b", "a\u2029b", "a\x85b", "a\fb"])
def test_only_line_feeds_end_lines(caption: str, tmp_path: Path) -> None:
    bom = "\ufeff"  # as Windows writes it
    pictures(tmp_path, "0.png")
    (tmp_path / "metadata.jsonl").write_text(bom + jsonl({"file_name": "0.png", "text": caption}), encoding="utf-8")
    (tmp_path / "0.txt").write_text(bom + caption + "\n", encoding="utf-8")
    for origin in ("text", ".txt"):
        assert ImageFiles(tmp_path).told(origin) == [caption]
    (tmp_path / "0.txt").write_text("two\nlines")
    with pytest.raises(ValueError, match=r"0\.txt has 2 lines"):
        ImageFiles(tmp_path).told(".txt")


def test_a_file_is_named_however_its_path_is_spelled(tmp_path: Path) -> None:
    pictures(tmp_path, "sub/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,x\n./sub//0.png,1\n")
    assert ImageFiles(tmp_path).columns["x"].tolist() == [1]


def test_folders_below_describe_their_own_images(tmp_path: Path) -> None:
    pictures(tmp_path, "a/0.png", "a/deep/1.png", "b/2.png")
    (tmp_path / "a/metadata.jsonl").write_text(
        jsonl({"file_name": "deep/1.png", "x": 1}, {"file_name": "0.png", "x": 0})
    )
    (tmp_path / "b/metadata.csv").write_text("file_name,x\n2.png,2\n")
    assert ImageFiles(tmp_path).columns["x"].tolist() == [0, 1, 2]
    (tmp_path / "metadata.csv").write_text("file_name,x\nb/2.png,3\n")
    with pytest.raises(ValueError, match=r"b/metadata.csv and .*/metadata.csv both have a row for 2.png"):
        ImageFiles(tmp_path)
    (tmp_path / "b/metadata.csv").unlink()
    assert ImageFiles(tmp_path).columns["x"].tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("id", [1, 2], "a column cannot be called 'id'"),
        ("class", [1, 2], "a column cannot be called 'class'"),
        ("my label", [1, 2], "a column cannot be called 'my label'"),
        ("folder", ["x", "y"], "the folder's name is called so"),
        ("hash", [2**64, 2], "value 18446744073709551616 is beyond int64"),
        ("kind", ["a", NAN], "value in row 1 is missing"),
    ],
)
def test_a_column_of_the_metadata_that_cannot_be_kept_is_left_out_and_named(
    name: str, values: list[Any], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path, "own/0.png", "own/1.png")
    rows = [{"file_name": f"own/{row}.png", name: value} for row, value in enumerate(values)]
    (tmp_path / "metadata.jsonl").write_text(jsonl(*rows))
    dataset = ImageFiles(tmp_path)
    assert {name: values.tolist() for name, values in dataset.columns.items()} == {"folder": ["own", "own"]}
    assert f"the metadata's column '{name}' is left out, as" in caplog.text
    assert why in caplog.text
    assert dataset.told(name)[0] == values[0]


def test_a_link_that_is_added_renames_no_image(tmp_path: Path) -> None:
    pictures(tmp_path, "own/b/0.png", "own/z/1.png", "elsewhere/2.png")
    before = ImageFiles(tmp_path / "own").ids.tolist()
    for link, folder in (("a", "z"), ("b/z", "z"), ("z/b", "b")):  # whichever folder is listed first
        (tmp_path / "own" / link).symlink_to(tmp_path / "own" / folder)
    assert ImageFiles(tmp_path / "own").ids.tolist() == before
    for link in ("y", "x"):
        (tmp_path / "own" / link).symlink_to(tmp_path / "elsewhere")
    found = ImageFiles(tmp_path / "own").ids.tolist()
    assert found == [before[0], str(tmp_path / "own/x/2.png"), before[1]]
