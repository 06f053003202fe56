"""docs/rewards.md speaks of the scorers that there are, by the names that they have."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rlpipe.config import ScorerSection
from rlpipe.reward.decomposition import parse_questions
from rlpipe.reward.endpoint import EndpointSettings
from rlpipe.reward.geneval import Thresholds
from rlpipe.reward.scorer import SCORERS

PAGE = (Path(__file__).resolve().parents[2] / "docs/rewards.md").read_text()
ENTRIES = [entry for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) for entry in yaml.safe_load(block)["reward"]]


def scorer_class(name: str) -> type:
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_every_section_of_the_page_is_one_that_its_scorer_takes(entry):
    section = ScorerSection(**entry)
    cls = scorer_class(section.scorer)
    keywords = {"path": section.path, **section.options}
    inspect.signature(cls).bind(**keywords)
    engine, writer = section.options.get("engine", {}), section.options.get("writer", {})
    known = {f.name for f in fields(EndpointSettings)}
    assert set(engine) <= known and set(writer) <= known | {"cache", "max_tokens"}


@pytest.mark.parametrize("name", SCORERS)
def test_every_registered_scorer_and_each_of_its_options_is_on_the_page(name):
    page = PAGE if name != "editing" else PAGE + (Path(__file__).resolve().parents[2] / "docs/editing.md").read_text()
    words = set(re.findall(r"\w+", page))
    assert {name, *inspect.signature(scorer_class(name)).parameters} - {"self", "args", "kwargs"} <= words


def test_the_line_of_questions_is_one_that_can_be_read():
    text = PAGE[PAGE.index('    {"prompt"') :]
    row = json.loads(text[: text.index("\n\n")])
    assert [q.parents for q in parse_questions(row["questions"])] == [(), ("1",)]


def test_every_key_of_a_section_and_every_threshold_is_on_the_page():
    words = set(re.findall(r"\w+", PAGE))
    assert {f.name for kind in (ScorerSection, Thresholds) for f in fields(kind)} <= words
    for field in fields(Thresholds):
        assert f"{field.name}: {field.default}" in PAGE.replace("\n", " ")
