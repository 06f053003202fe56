"""Parity with golden vectors of the official code; RLPIPE_GOLDEN names their directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.check_parity import main

FOLDER = os.environ.get("RLPIPE_GOLDEN", "")
needs_golden = pytest.mark.skipif(not FOLDER, reason="RLPIPE_GOLDEN does not name a directory of golden vectors")


def changed(tmp_path: Path, change) -> Path:
    """The golden directory with other values in its golden.json."""
    folder = tmp_path / "golden"
    folder.mkdir()
    for file in Path(FOLDER).iterdir():
        if file.name != "golden.json":
            (folder / file.name).symlink_to(file.resolve())
    values = json.loads((Path(FOLDER) / "golden.json").read_text("utf-8"))
    change(values)
    (folder / "golden.json").write_text(json.dumps(values), "utf-8")
    return folder


def run(folder: Path, tmp_path: Path) -> tuple[int, dict[str, bool]]:
    """Exit status, and whether each part passed."""
    status = main(["--golden", str(folder), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["passed"] == (status == 0)
    return status, {part["name"]: part["passed"] for part in result["parts"]}


@needs_golden
def test_every_part_agrees_with_the_official_code(tmp_path, capsys):
    status, parts = run(Path(FOLDER), tmp_path)
    assert status == 0 and all(parts.values())
    assert {f"{rule} loss" for rule in ("v1", "v2", "v3")} < set(parts)
    assert capsys.readouterr().out.count("pass ") == len(parts)


@needs_golden
def test_a_number_that_is_off_fails_its_part_alone(tmp_path):
    def change(values: dict) -> None:
        version = values["learner"]["versions"][0]
        version["loss"] += 1e-3
        version["segments"][1]["policy_logprobs"][2][3] += 1e-3
        version["segments"][2]["advantages"][0] = float("nan")
        version["grad_norm"]["gen_embed"] *= 1.01
        values["greedy"][0]["image_2"][-1] += 1
        values["parts"]["understanding"][0][0][0] += 1e-2

    status, parts = run(changed(tmp_path, change), tmp_path)
    rule = json.loads((Path(FOLDER) / "golden.json").read_text("utf-8"))["learner"]["versions"][0]["version"]
    failed = {name for name, passed in parts.items() if not passed}
    assert status == 1
    assert failed == {
        f"{rule} loss",
        f"{rule} reflection policy log-probs",
        f"{rule} final advantages",
        f"{rule} gradient norm gen_embed",
        "greedy image_2",
        "understanding embeddings",
    }


@needs_golden
def test_a_group_of_another_size_and_fewer_captions_are_another_directory_of_the_format(tmp_path):
    def change(values: dict) -> None:
        values["greedy"] = values["greedy"][:2]
        values["learner"]["versions"] = []
        for key in ("understanding", "vq_codes", "vq_decode"):
            values["parts"][key] = values["parts"][key][:1]

    status, parts = run(changed(tmp_path, change), tmp_path)
    assert status == 0 and not any(name.startswith("v1") for name in parts)


@needs_golden
def test_what_is_missing_is_named(tmp_path, capsys):
    folder = changed(tmp_path, lambda values: values["learner"].pop("guidance_scale"))
    assert main(["--golden", str(folder)]) == 2
    assert "no learner.guidance_scale" in capsys.readouterr().err


def test_a_folder_without_golden_vectors_is_named(tmp_path, capsys):
    assert main(["--golden", str(tmp_path)]) == 2
    assert "--golden: no golden.json" in capsys.readouterr().err
    (tmp_path / "golden.json").write_text("{", "utf-8")
    assert main(["--golden", str(tmp_path)]) == 2
    assert "not JSON" in capsys.readouterr().err
