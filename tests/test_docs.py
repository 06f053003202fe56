"""The examples of the documentation do what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from rlpipe.config import ScorerSection
from rlpipe.observe.metrics import describe
from rlpipe.reward.scorer import build_scorer
from rlpipe.types import Prompt, ScoreRequest

ROOT = Path(__file__).resolve().parent.parent
METRICS_PAGE = (ROOT / "docs/metrics.md").read_text()


def test_the_reward_class_of_the_docs_is_built_by_its_import_path_and_scores(tmp_path, monkeypatch):
    text = (ROOT / "docs/rewards.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "my_rewards.py" in block)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    section = ScorerSection(scorer="my_rewards:LikesBlue", path=None, options={"strength": 2.0})
    blue = np.zeros((48, 48, 3), np.uint8)
    blue[..., 2] = 51
    scores = build_scorer(section).score([ScoreRequest("0", Prompt("0", "a sky"), blue)])
    assert scores[0].value == pytest.approx(0.4)


def test_every_link_of_the_readme_and_the_docs_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_metric_prefix_of_the_docs_is_known_to_the_report():
    names = re.findall(
        r"`((?:train|reward|rollout|loss|kl|mismatch|time|idle|failures|decline)/[\w/*<>]*)`", METRICS_PAGE
    )
    assert len(names) > 15
    assert [name for name in names if not describe(name)] == []
