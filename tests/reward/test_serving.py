"""The folder that vLLM loads a judge from, as far as it can be looked at without vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, InternVLConfig

from launch.serve_judge import main
from rlpipe.paths import resolve_path
from rlpipe.reward.internvl import JudgeFormat
from rlpipe.reward.serving import serving_folder

JUDGE = resolve_path("rlpipe/world/assets/judge")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("system", ["", "the red square"])
@pytest.mark.parametrize("texts", [("", "\nDoes this image match ?"), ("the ", "\nand ", "\nis yellow ?")])
def test_the_chat_template_gives_the_token_ids_of_the_judges_format(texts, system, tmp_path):
    folder = serving_folder(JUDGE, tmp_path / "served")
    config = InternVLConfig.from_pretrained(folder)
    expected = JudgeFormat(AutoTokenizer.from_pretrained(JUDGE), config, system).tokens(texts)
    parts = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "system", "content": system}] if system else []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    # As transformers' processor and vLLM's do.
    image = tokenizer.start_image_token + tokenizer.context_image_token * config.image_seq_length
    chat = chat.replace("<IMG_CONTEXT>", image + tokenizer.end_image_token)
    assert tokenizer.encode(chat, add_special_tokens=False) == expected


def test_a_checkpoint_without_processor_gets_one_of_its_own_size_and_is_not_changed(tmp_path):
    before = contents(JUDGE)
    folder = serving_folder(JUDGE, tmp_path / "served", max_tiles=4)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert images["size"] == {"height": 48, "width": 48} and images["max_patches"] == 4
    assert (folder / "model.safetensors").resolve() == JUDGE / "model.safetensors"
    assert contents(JUDGE) == before


def test_a_checkpoints_own_processor_stays(tmp_path):
    shutil.copytree(JUDGE, tmp_path / "judge")
    (tmp_path / "judge/preprocessor_config.json").write_text('{"max_patches": 6}')
    folder = serving_folder(tmp_path / "judge", tmp_path / "served")
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {"max_patches": 6}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        serving_folder(JUDGE, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_the_server_of_a_folder_without_a_judge_does_not_start_and_says_why(tmp_path, capsys):
    assert main([str(tmp_path), "--dtype", "float32"]) == 2
    assert "no config.json" in capsys.readouterr().err
