"""What a server's list of likeliest tokens says of yes and no."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlpipe.reward.http import first_token, judged
from rlpipe.reward.judge import NO, YES


def listed(**probabilities: float) -> dict[str, float]:
    return {text.replace("_", " "): math.log(p) for text, p in probabilities.items()}


def test_neither_yes_nor_no_in_the_list_is_a_reason_and_no_number():
    answer = judged(listed(The=0.9, It=0.05), (*YES, *NO), 1e-3)
    assert answer.p_yes is None and "neither yes nor no" in answer.error and "'The', 'It'" in answer.error


@pytest.mark.parametrize("most", [-1e-9, -1e-6])
def test_next_to_no_probability_for_yes_and_no_is_a_reason_and_no_number(most):
    answer = judged(
        {"The": most, "yes": -20.0, "Yes": -21.0, "YES": -22.0, "no": -20.0, "No": -21.0}, (*YES, *NO), 1e-3
    )
    assert answer.p_yes is None and "less than a millionth" in answer.error


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), 3.0, True, "-1", None])
def test_what_is_no_log_prob_is_no_answer(logprob):
    token = {"token": "yes", "logprob": -0.1, "top_logprobs": [{"token": "no", "logprob": logprob}]}
    with pytest.raises(Exception, match="the answer has"):
        first_token({"choices": [{"logprobs": {"content": [token]}}]})


def test_a_missing_spelling_bounds_the_answer_by_the_least_likely_token_of_the_list():
    sure = judged(listed(Yes=0.999, The=1e-6), (*YES, *NO), 1e-3)
    assert 0.99999 < sure.p_yes < 1.0 and sure.mass == pytest.approx(0.999)
    vague = judged(listed(Yes=0.3, The=0.6, It=0.05), (*YES, *NO), 1e-3)
    assert vague.p_yes is None and "[0.8571, 1.0000]" in vague.error  # no: at most the 0.05 that the list leaves
    assert judged(listed(Yes=0.3, The=0.6, It=0.05), (*YES, *NO), 0.2).p_yes == pytest.approx((0.3 / 0.35 + 1) / 2)


def test_the_true_value_lies_where_a_list_says_it_does():
    generator = np.random.default_rng(0)
    words = [*YES, *NO, *(f"w{i}" for i in range(40))]
    for _ in range(50):
        shares = generator.dirichlet(np.full(len(words), 0.2))
        full = {word: math.log(share) for word, share in zip(words, shares, strict=True)}
        truth = shares[:3].sum() / shares[:6].sum()
        top = dict(sorted(full.items(), key=lambda pair: -pair[1])[:12])
        answer = judged(top, (*YES, *NO), 0.05)
        assert answer.p_yes is None or abs(answer.p_yes - truth) <= 0.025 + 1e-9
        assert judged(full, (*YES, *NO), 0.0).p_yes == pytest.approx(truth, abs=1e-6)


def test_a_blank_before_a_spelling_is_read_where_it_is_not_listed_without():
    assert judged(listed(_Yes=0.6, _No=0.4), ("Yes", "No"), 1e-3).p_yes == pytest.approx(0.6)
    assert judged(listed(Yes=0.6, No=0.3, _No=0.1), ("Yes", "No"), 1e-3).p_yes == pytest.approx(2 / 3)
