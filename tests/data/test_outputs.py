from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import Config
from rlpipe.data.outputs import (
    OutputError,
    Remark,
    Results,
    fingerprint,
    generation_prompts,
    program_of,
    record_of,
    requests_of,
    sample_seed,
    settings_of,
)
from rlpipe.data.prompts import PromptError
from rlpipe.types import Prompt

PROMPTS = [Prompt("a", "two circles"), Prompt("b", "a red\u2028square")]
"""The second has a separator at which str.splitlines would cut a row."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.generate.dir, config.generate.samples = str(tmp_path / "results"), 3
    return config


def results_of(config: Config) -> Results:
    return Results(config.generate.dir, program_of(config))


def save(results: Results, requests: list, shade: int = 1) -> None:
    pixels = np.full((4, 4, 3), shade, np.uint8)
    rows = [record_of(request, [Remark(True, "Yes.", 0.75)]) for request in requests]
    results.save(requests, rows, [{f"samples/{request.name}": pixels} for request in requests])


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_seed_is_that_of_run_seed_prompt_and_number_alone():
    seeds = {sample_seed(seed, prompt, number) for seed in (0, 1) for prompt in ("a", "b") for number in range(5)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, "2", 3) != sample_seed(12, "", 3)


def test_samples_are_named_by_running_numbers_and_keep_their_seed_among_other_prompts(config):
    both, second = requests_of(config, PROMPTS), requests_of(config, PROMPTS[1:])
    assert [request.name for request in both] == [f"000{i}.png" for i in range(6)]
    assert [request.seed for request in both[3:]] == [request.seed for request in second]
    config.generate.samples = 6000
    names = [request.name for request in requests_of(config, PROMPTS)]
    assert names[0] == "00000.png" and names == sorted(names)


def test_parts_become_records_in_order_without_repeats_and_the_folder_is_clean(config):
    results, requests = results_of(config), requests_of(config, PROMPTS)
    results.begin(settings_of(config, PROMPTS))
    save(results, requests[4:])
    save(results, requests[:2])
    assert list(results.gather(requests)) == [request.key for request in (*requests[:2], *requests[4:])]
    save(results, requests[:2])
    save(results, requests[2:4])
    rows = results.gather(requests)
    results.end()
    assert [row["filename"] for row in rows.values()] == [request.name for request in requests]
    stored = results.records.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in stored] == list(rows.values())
    images = {f"samples/{request.name}" for request in requests}
    assert files_below(results.folder) == {"reason.jsonl", "settings.yaml", *images}
    assert not results.parts.exists()


def test_what_an_interrupted_writer_left_does_not_count_and_is_cleared_away(config):
    results, requests = results_of(config), requests_of(config, PROMPTS)
    results.begin(settings_of(config, PROMPTS))
    save(results, requests[:1])
    (results.parts / ".0.jsonl.7.partial").write_text('{"id": "a", "sample": 1')
    (results.folder / "samples" / ".0001.png.7.partial").write_bytes(b"\x89PNG")
    assert list(results.gather(requests)) == [requests[0].key]
    results.end()
    assert not [path for path in files_below(results.folder) if "partial" in path]


def test_a_damaged_row_is_named_by_file_and_line(config):
    results, requests = results_of(config), requests_of(config, PROMPTS)
    results.begin(settings_of(config, PROMPTS))
    save(results, requests[:1])
    results.gather(requests)
    with results.records.open("a") as stream:
        stream.write('{"prompt": "no id"}\n')
    with pytest.raises(OutputError, match=r"reason\.jsonl:2 is no row"):
        results.gather(requests)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("rollout", "guidance", 2.0), ("generate", "samples", 4), ("generate", "verdict_threshold", 0.57)],
)
def test_a_folder_of_other_settings_is_refused_and_the_setting_is_named(config, section, key, value):
    results_of(config).begin(settings_of(config, PROMPTS))
    assert results_of(config).problems(settings_of(config, PROMPTS)) == []
    setattr(getattr(config, section), key, value)
    (problem,) = results_of(config).problems(settings_of(config, PROMPTS))
    assert key in problem and f"{value!r}" in problem and "generate.dir" in problem
    with pytest.raises(OutputError):
        results_of(config).begin(settings_of(config, PROMPTS))


def test_other_prompts_another_seed_or_another_policy_are_refused_but_not_other_workers(config, tmp_path):
    shutil.copytree("rlpipe/world/assets/policy", tmp_path / "policy")
    config.policy.path = str(tmp_path / "policy")
    results_of(config).begin(settings_of(config, PROMPTS))
    config.rollout.workers, config.generate.batch_size, config.rollout.threads = 3, 1, 7
    assert results_of(config).problems(settings_of(config, PROMPTS)) == []
    assert results_of(config).problems(settings_of(config, PROMPTS[::-1]))
    config.seed = 1
    assert results_of(config).problems(settings_of(config, PROMPTS))
    config.seed = 0
    weights = tmp_path / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    before = fingerprint(tmp_path / "policy")
    weights.write_bytes(content)
    assert fingerprint(tmp_path / "policy") != before
    assert results_of(config).problems(settings_of(config, PROMPTS))


@pytest.mark.parametrize("name", ["reason.jsonl", "samples/0000.png"])
def test_a_folder_with_images_or_records_of_something_else_is_refused(config, name):
    path = Path(config.generate.dir) / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    (problem,) = results_of(config).problems(settings_of(config, PROMPTS))
    assert "of something else" in problem


def test_resume_never_refuses_a_used_folder(config):
    settings = settings_of(config, PROMPTS)
    assert results_of(config).problems(settings, "never") == []
    results_of(config).begin(settings)
    (problem,) = results_of(config).problems(settings, "never")
    assert problem.startswith("resume: 'never'")


def test_several_remarks_are_all_in_the_row_and_the_first_one_is_the_official_part(config):
    request = requests_of(config, PROMPTS)[0]
    remarks = [Remark(False, "No, one.", 0.25), Remark(True, "Yes.", 0.75)]
    row = record_of(request, remarks, 2)
    assert {key: row[key] for key in ("prompt", "filename", "correct", "reason", "yes_score")} == {
        "prompt": "two circles",
        "filename": "0000.png",
        "correct": False,
        "reason": "No, one.",
        "yes_score": 0.25,
    }
    assert [remark["correct"] for remark in row["rounds"]] == [False, True] and row["images"] == 2


def test_a_folder_of_images_goes_with_one_caption_in_the_order_of_the_names(config, tmp_path):
    for name in ("2.png", "1.png"):
        Image.new("RGB", (6, 6)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    config.generate.images, config.generate.caption = str(tmp_path), "a cross"
    prompts = generation_prompts(config)
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("1.png", "a cross"), ("2.png", "a cross")]
    assert program_of(config) == "look"
    assert [request.name for request in requests_of(config, prompts)] == ["1.png", "2.png"]
    config.rollout.program = "edit"
    assert program_of(config) == "edit"
    assert [request.name for request in requests_of(config, prompts)][-1] == "0005.png"


def test_images_that_cannot_be_used_are_named(config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    config.generate.images = str(tmp_path)
    with pytest.raises(PromptError, match=r"generate\.caption: empty"):
        generation_prompts(config)
    config.generate.caption = "a cross"
    with pytest.raises(PromptError, match=r"broken\.png cannot be read"):
        generation_prompts(config)
    (tmp_path / "prompts.txt").write_text("a cross\n")
    config.generate.images, config.generate.caption = str(tmp_path / "prompts.txt"), ""
    with pytest.raises(PromptError, match="has no source_image"):
        generation_prompts(config)
