r"""The \boxed{} judge: on a real server on loopback whose words are chosen, and on the tiny judge itself."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.boxed import TEMPLATE, boxed, enlarged
from rlpipe.reward.scorer import build_scorer, check_scorers, score_all
from rlpipe.types import Prompt, ScoreRequest
from tests.reward.http_server import JudgeServer


class Says:
    """Answers a chat with the words for the prompt that is in it; keeps what it was asked."""

    def __init__(self, words: dict[str, str], finish_reason: str = "stop") -> None:
        self.words, self.finish_reason, self.asked = words, finish_reason, []

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        text = "".join(part.get("text", "") for part in body["messages"][-1]["content"])
        words = next(words for key, words in self.words.items() if f'"{key}"' in text)
        return {"message": {"content": words}, "finish_reason": self.finish_reason}


def section(server: JudgeServer, **options) -> ScorerSection:
    engine = {"url": server.url, "model": server.model, "retries": 0}
    return ScorerSection(scorer="boxed", path=None, options={"backend": "http", "engine": engine, **options})


def ask(*prompts: str, size: tuple[int, int] = (48, 48)) -> list[ScoreRequest]:
    images = np.random.default_rng(0).integers(0, 256, (len(prompts), *size, 3), dtype=np.uint8)
    return [ScoreRequest(f"r{i}", Prompt(str(i), p), images[i]) for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"It matches. \boxed{1}", 1),
        (r"\boxed{0}.", 0),
        (r"First I thought \boxed{1}, but one is blue: \boxed{0}", 0),
        (r"\boxed{1} and then \boxed{maybe}", None),
        (r"\boxed{\text{1}}", None),
        (r"\boxed{10}", None),
        (r"\boxed{ 1 }", 1),
        ("\\boxed{\n0\n}", 0),
        (r"\boxed{1 0}", None),
        (r"\boxed{1", None),
        ("1", None),
        ("", None),
    ],
)
def test_the_last_box_counts_and_only_an_exact_one_or_zero(text, value):
    assert boxed(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [(r"I would say \boxed{1} only if all were there, but the third", None), (r"Thus $\boxed{1}$.", 1), ("Thus", None)],
)
def test_an_answer_that_is_cut_counts_only_if_it_ends_with_its_box(text, value):
    assert boxed(text, cut=True) == value
    with JudgeServer(judge=Says({"a cat": text}, finish_reason="length"), vllm=False) as server:
        (score,) = score_all(build_scorer(section(server)), ask("a cat"))
    assert score.value == value and (value is not None or "cut at max_tokens=1024" in score.error)


def test_scores_are_one_and_zero_and_an_answer_without_a_box_is_missing_with_its_words():
    judge = Says({"a red circle": r"All there: \boxed{1}", "a cat": r"No cat. \boxed{0}", "a dog": "I see  a dog."})
    with JudgeServer(judge=judge, vllm=False) as server:
        scores = score_all(build_scorer(section(server)), ask("a red circle", "a cat", "a dog"))
        assert [score.value for score in scores] == [1.0, 0.0, None]
        assert scores[2].error.endswith("'I see a dog.'")
        official = score_all(build_scorer(section(server, unparsable="zero")), ask("a dog", "a red circle"))
    assert [(score.value, score.parts["unparsable"]) for score in official] == [(0.0, 1.0), (1.0, 0.0)]


def test_the_judge_sees_an_enlarged_image_and_the_prompt_without_its_first_words():
    judge = Says({"two dogs": r"\boxed{1}"})
    with JudgeServer(judge=judge, vllm=False) as server:
        build_scorer(section(server, max_tokens=77)).score(ask("A photo of two dogs", size=(30, 60)))
    (body,) = judge.asked
    before, image, after = body["messages"][-1]["content"]
    picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    # The chat template ends the image's line by itself.
    assert before["text"] + "<image>\n" + after["text"] == TEMPLATE.replace("{prompt}", "two dogs")
    assert picture.width * picture.height >= 512 * 512 and abs(picture.width - 2 * picture.height) <= 2
    assert (body["max_tokens"], body["temperature"]) == (77, 0)


def test_a_server_that_fails_leaves_the_score_missing():
    with JudgeServer(judge=Says({"a cat": r"\boxed{1}"}), vllm=False, fail=("http_500",), every=1) as server:
        (score,) = score_all(build_scorer(section(server)), ask("a cat"))
    assert score.missing and "HTTP 500" in score.error


def test_the_tiny_judge_writes_no_box_so_its_scores_are_missing():
    tiny = ScorerSection(scorer="boxed", options={"max_tokens": 4, "min_size": 0})
    for score in score_all(build_scorer(tiny, device="cpu"), ask("a red circle", "a blue square")):
        assert score.missing and r"no \boxed{1} or \boxed{0}" in score.error


def test_images_of_enough_pixels_stay_as_they_are():
    image = ask("a", size=(20, 30))[0].image
    assert enlarged(image, 24) is image
    assert enlarged(image, 25).shape == (21, 31, 3)
    assert enlarged(image, 0) is image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Is it there? <image>"}, "template: 'Is it there? <image>' has no {prompt}"),
        ({"template": "Is it {prompt}?"}, "has 0 times <image>; put it 1 times"),
        ({"unparsable": "half"}, "unparsable: 'half' is none of missing, zero"),
        ({"max_tokens": 0}, "max_tokens: 0; give a whole number from 1"),
        ({"min_size": 1.5}, "min_size: 1.5; give a whole number from 0"),
        ({"backend": "carrier pigeon"}, "backend: 'carrier pigeon' is unknown"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(options, message):
    with pytest.raises(ConfigError) as error:
        check_scorers([ScorerSection(name="r1", scorer="boxed", options=options)])
    assert message in str(error.value) and "\n" not in str(error.value)
