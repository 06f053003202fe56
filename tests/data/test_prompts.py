from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlpipe.data.prompts import PromptCursor, PromptError, load_prompts
from rlpipe.types import Prompt

ROWS = [
    {"prompt": "two circles", "id": "a", "tag": "counting", "include": [{"class": "circle", "count": 2}]},
    {"prompt": "a red square", "id": "b", "tag": "colors", "include": [{"class": "square", "count": 1}]},
    {"prompt": "a cross"},
]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), text=f"a photo of {i} circles") for i in range(count)]


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n  a blue square \n\n\n")
    assert load_prompts(path) == [Prompt("p-00001", "a red circle"), Prompt("p-00002", "a blue square")]


def test_jsonl_parquet_and_datasets_folders_give_the_same_prompts(tmp_path):
    expected = load_prompts(jsonl(tmp_path / "p.jsonl", ROWS))
    assert [p.id for p in expected] == ["a", "b", "p-00003"]
    assert expected[0].metadata == {"tag": "counting", "include": [{"class": "circle", "count": 2}]}
    assert expected[2].metadata == {}

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet") == expected

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved" / "p")
    assert load_prompts(tmp_path / "saved" / "p") == expected

    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "split" / "p")
    assert load_prompts(tmp_path / "split" / "p") == expected

    (tmp_path / "files" / "p").mkdir(parents=True)
    jsonl(tmp_path / "files" / "p" / "train.jsonl", ROWS)
    assert load_prompts(tmp_path / "files" / "p") == expected


def test_several_splits_ask_for_one(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "p")
    assert "train, test" in problems_of(tmp_path / "p")[0]
    assert len(load_prompts(tmp_path / "p" / "test")) == 3


def test_nested_metadata_and_columns_come_together(tmp_path):
    row = {"prompt": "x", "metadata": {"source": "web", "tag": "old"}, "tag": "new", "exclude": []}
    (prompt,) = load_prompts(jsonl(tmp_path / "p.jsonl", [row]))
    assert prompt.metadata == {"source": "web", "tag": "new", "exclude": []}


def test_a_source_image_lies_beside_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").touch()
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "source_image": "images/0.png"}])
    assert load_prompts(path)[0].source_image == str(tmp_path / "images" / "0.png")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("", "not JSON"),
        ('"x"', "a str; give an object"),
        ('{"text": "x"}', "prompt is missing"),
        ('{"prompt": " "}', "prompt is empty"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"prompt": "x", "id": 1.5}', "id is 1.5"),
        ('{"prompt": "x", "id": "first"}', "id 'first' is taken by"),
        ('{"prompt": "x", "tag": 3}', "tag is 3"),
        ('{"prompt": "x", "include": "circle"}', "include is 'circle'"),
        ('{"prompt": "x", "include": ["circle"]}', "include is ['circle']"),
        ('{"prompt": "x", "metadata": [1]}', "metadata is [1]"),
        ('{"prompt": "x", "source_image": "no.png"}', "source_image is 'no.png'; no such file"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "id": "first"}\n' + line + '\n{"prompt": "y"}\n')
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:2: {says}")


def test_bad_rows_of_text_and_tables_are_named_too(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    assert problems_of(tmp_path / "p.txt")[0].startswith(f"{tmp_path / 'p.txt'}:2: prompt is empty")
    table = pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": None}])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    (problem,) = problems_of(tmp_path / "p.parquet")
    assert problem.startswith(f"{tmp_path / 'p.parquet'}: row 2: prompt is missing")


def test_ten_bad_rows_are_told_and_the_others_counted(tmp_path):
    lines = problems_of(jsonl(tmp_path / "p.jsonl", [{"prompt": ""}] * 13))
    assert len(lines) == 11 and lines[-1] == "and 3 more problems"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.parquet", "p.csv", "folder"])
def test_a_file_without_prompts_is_refused(tmp_path, name):
    assert "does not exist" in problems_of(tmp_path / name)[0]
    (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    assert problems_of(tmp_path / name)[0].startswith(str(tmp_path / name))


def test_a_table_without_the_prompt_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), tmp_path / "p.parquet")
    assert problems_of(tmp_path / "p.parquet") == [f"{tmp_path / 'p.parquet'}: no column `prompt` among text"]


def test_every_epoch_has_every_prompt_once_in_a_new_order():
    cursor = PromptCursor(prompts(20), seed=3)
    drawn = [row for _ in range(10) for row in cursor.next(6)]
    assert [index for index, _ in drawn] == list(range(60))
    epochs = [[prompt.id for _, prompt in drawn[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_the_seed_s():
    first = PromptCursor(prompts(50), seed=1).next(50)
    assert first == PromptCursor(prompts(50), seed=1).next(50)
    assert first != PromptCursor(prompts(50), seed=2).next(50)
    assert PromptCursor(prompts(5), shuffle=False).next(5) == list(enumerate(prompts(5)))


@pytest.mark.parametrize("done", [0, 7, 20, 33])
def test_a_restored_cursor_goes_on_where_the_other_stood(done):
    cursor = PromptCursor(prompts(20), seed=5)
    cursor.next(done)
    state = json.loads(json.dumps(cursor.state()))
    resumed = PromptCursor(prompts(20), seed=5)
    resumed.restore(state)
    assert resumed.next(45) == cursor.next(45)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (PromptCursor(prompts(21)), "data.prompts"),
        (PromptCursor([*prompts(19), Prompt(id="19", text="another")]), "data.prompts"),
        (PromptCursor(prompts(20), seed=1), "seed"),
        (PromptCursor(prompts(20), shuffle=False), "data.shuffle"),
    ],
)
def test_the_state_of_another_stream_is_refused(other, field):
    cursor = PromptCursor(prompts(20))
    with pytest.raises(ValueError, match=f"^{field}: "):
        cursor.restore(other.state())


def test_a_moved_prompt_file_is_the_same_stream(tmp_path):
    states = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").touch()
        path = jsonl(tmp_path / folder / "p.jsonl", [{"prompt": "x", "source_image": "0.png"}])
        states.append(PromptCursor(load_prompts(path)).state())
    assert states[0] == states[1]
