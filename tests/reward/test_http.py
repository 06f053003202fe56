"""The judge behind HTTP: a real tiny judge on a local server that fails in every way."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import numpy as np
import pytest

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.backend import Query, build_backend, check_backend
from rlpipe.reward.endpoint import Endpoint, EndpointSettings, ServerError
from rlpipe.reward.http import HTTPBackend
from rlpipe.reward.internvl import InternVLBackend
from rlpipe.reward.judge import NO, YES
from rlpipe.reward.scorer import build_scorer
from rlpipe.reward.service import ScoreCounts, ScoreService
from rlpipe.types import Prompt, ScoreRequest
from rlpipe.world.models import JUDGE_QUESTION
from rlpipe.world.prompts import sample_spec
from rlpipe.world.render import render
from rlpipe.world.scenes import near_miss, sample_scene
from tests.reward.http_server import FAILURES, JUDGE, JudgeServer, TinyJudge

SLOW = ("hang", "trickle")
KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture(scope="module")
def tiny() -> TinyJudge:
    return TinyJudge()


@pytest.fixture(scope="module")
def local() -> InternVLBackend:
    return InternVLBackend(JUDGE, device="cpu")


def pictures(count: int) -> list[tuple[str, np.ndarray]]:
    """Prompts, each with a scene that it describes or, every other time, with one that it just misses."""
    rng = random.Random(0)
    specs = [sample_spec(rng) for _ in range(count)]
    return [(s.text, render((near_miss if i % 2 else sample_scene)(rng, s))) for i, s in enumerate(specs)]


def ask(count: int) -> list[Query]:
    return [Query.about(JUDGE_QUESTION.replace("{prompt}", text), image) for text, image in pictures(count)]


def connect(server: JudgeServer, **engine: object) -> HTTPBackend:
    return HTTPBackend(None, **{"url": server.url, "model": server.model, "backoff_s": 0.01, **engine})


def values(answers: list) -> np.ndarray:
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    return np.array([(answer.p_yes, answer.mass) for answer in answers])


def test_a_server_with_the_tokens_log_probs_gives_what_the_transformers_backend_gives(tiny, local):
    queries = ask(12)
    with JudgeServer(judge=tiny) as server:
        answers = connect(server).answer(queries)
    np.testing.assert_allclose(values(answers), values(local.answer(queries)), atol=1e-6)
    assert values(answers)[:, 0].std() > 0.1


def test_a_server_with_a_list_of_likeliest_tokens_gives_the_same_up_to_the_tolerance(tiny, local):
    queries = ask(12)
    with JudgeServer(judge=tiny, vllm=False) as server:
        answers = connect(server, tolerance=1e-3).answer(queries)
    np.testing.assert_allclose(values(answers), values(local.answer(queries)), atol=5e-4)


@pytest.mark.parametrize("ends_lines", [True, False])
def test_texts_around_two_images_and_a_system_message_arrive_as_they_are_by_either_template(tiny, ends_lines):
    (_, first), (_, second) = pictures(2)
    queries = [
        Query(("Image-1: ", "\nImage-2: ", "\n\nDoes it match?"), (first, second)),
        Query(("Does it match?",)),
        Query.about("Does it match?", first),
    ]
    reference = InternVLBackend(JUDGE, device="cpu", system="red")
    with JudgeServer(judge=tiny, ends_lines=ends_lines) as server:
        backend = HTTPBackend(None, system="red", url=server.url, model=server.model)
        found = values(backend.answer(queries))
        assert sorted(server.read) == sorted(query.texts for query in queries)
        assert [a.text for a in backend.write(queries, 3)] == [a.text for a in reference.write(queries, 3)]
    np.testing.assert_allclose(found, values(reference.answer(queries)), atol=1e-6)


def test_a_text_that_would_be_read_as_a_token_of_the_chat_is_not_asked(tiny):
    ((_, image),) = pictures(1)
    with JudgeServer(judge=tiny) as server:
        bad, good = connect(server).answer([Query.about("red<|im_end|>", image), Query.about("a < b | c > d", image)])
        assert "'<|im_end|>'" in bad.error and good.error is None and server.requests == 1


def test_equal_queries_are_asked_once_and_what_is_prepared_is_not_prepared_again(tiny):
    queries = ask(3)
    with JudgeServer(judge=tiny) as server:
        backend = connect(server)
        prepared = backend.prepare([*queries, *queries])
        spent = backend.prepare_seconds
        answers = backend.answer([*queries, *queries], prepared)
        assert server.requests == 3 and answers[:3] == answers[3:]
        assert spent > 0 and backend.prepare_seconds == spent


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_retried_and_then_missing_with_its_reason(tiny, kind):
    reasons = {
        "http_500": "HTTP 500: the engine is dead",
        "http_429": "HTTP 429: slow down",
        "hang": "no answer within 0.3 s",
        "trickle": "no answer within 0.3 s",
        "close": "disconnected",
        "malformed_json": "no JSON",
        "wrong_shape": "no choices[0].logprobs",
        "nan": "not a finite number",
    }
    counted = {"hang": "timeout", "trickle": "timeout", "close": "connection", "nan": "not_finite"}
    with JudgeServer(judge=tiny, fail=(kind,), every=1) as server:
        backend = connect(server, retries=2, timeout_s=0.3 if kind in SLOW else 10.0)
        (answer,) = backend.answer(ask(1))
        assert answer.p_yes is None and answer.mass is None
        assert reasons[kind] in answer.error and "attempts: 3" in answer.error
        assert server.requests == 3 and backend.counts["retries"] == 2
        assert backend.counts[f"failed/{counted.get(kind, kind)}"] == 3


@pytest.mark.parametrize("kind", FAILURES)
def test_a_server_that_heals_gives_every_answer(tiny, local, kind):
    queries = ask(3)
    with JudgeServer(judge=tiny, fail=(kind,), every=1, heal=2) as server:
        answers = connect(server, retries=2, timeout_s=2.0 if kind in SLOW else 10.0).answer(queries)
    assert server.failed[kind] == 2
    np.testing.assert_allclose(values(answers), values(local.answer(queries)), atol=1e-6)


def test_a_bad_request_is_not_repeated_and_leaves_the_others_alone(tiny, local):
    queries = ask(2)
    long = Query.about("red " * 5000, queries[0].images[0])
    with JudgeServer(judge=tiny) as server:
        answers = connect(server).answer([queries[0], long, queries[1]])
        assert server.requests == 3
        refused = connect(server, model="another").answer(queries)
    assert answers[1].error.startswith("HTTP 400: the prompt is 50") and "attempts" not in answers[1].error
    np.testing.assert_allclose(values(answers[::2]), values(local.answer(queries)), atol=1e-6)
    assert [answer.error for answer in refused] == ["HTTP 404: The model 'another' does not exist."] * 2


def test_a_server_that_is_not_there_is_a_reason():
    backend = HTTPBackend(None, url="http://127.0.0.1:9/v1", model="judge", retries=1, backoff_s=0.01)
    (answer,) = backend.answer(ask(1))
    assert answer.error.startswith("http://127.0.0.1:9/v1: ConnectError") and backend.counts["failed/connection"] == 2


@pytest.mark.parametrize("as_date", [False, True])
def test_a_server_that_asks_for_more_patience_than_there_is_is_not_asked_again(tiny, as_date):
    later = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True) if as_date else "7200"
    with JudgeServer(judge=tiny, fail=("http_429",), every=1, retry_after=later) as server:
        (answer,) = connect(server).answer(ask(1))
        assert server.requests == 1 and "asked to wait 7" in answer.error


def test_the_pause_that_a_server_asks_for_is_kept_and_else_it_doubles(tiny, monkeypatch):
    pauses = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr("rlpipe.reward.endpoint.time", clock)
    for kind in ("http_429", "http_500"):
        with JudgeServer(judge=tiny, fail=(kind,), every=1, retry_after="7") as server:
            with pytest.raises(ServerError, match="attempts: 4"):
                Endpoint(EndpointSettings(server.url, server.model, retries=3, backoff_s=1.0)).chat("yes", 1)
    assert pauses[:3] == [7.0] * 3
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses[3:], (1.0, 2.0, 4.0), strict=True))


def test_no_more_requests_are_under_way_than_allowed_over_all_threads(tiny):
    queries = ask(12)
    with JudgeServer(judge=tiny, delay_s=0.05) as server:
        backend = connect(server, concurrency=3)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda i: backend.answer(queries[i::6]), range(6)))
            list(threads.map(lambda i: backend.endpoint.chat(f"red {i}", 1), range(8)))
        assert server.requests == 20 and server.most_at_once == 3


def test_batches_of_several_threads_are_under_way_together_however_small_they_are(tiny):
    queries = ask(12)
    with JudgeServer(judge=tiny, delay_s=0.3) as server:
        backend = connect(server, batch_size=2, concurrency=5)
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda i: backend.answer(queries[2 * i : 2 * i + 2]), range(6)))
        assert 2 < server.most_at_once <= 5


class Odd(TinyJudge):
    """Says of pictures of circles what no reader expects."""

    def answer(self, body):
        choice = super().answer(body)
        if "circle" in str(body["messages"]):
            choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = -(10**400)
        return choice


def test_an_answer_that_nobody_expects_leaves_the_others_of_its_batch_alone():
    ((_, image),) = pictures(1)
    with JudgeServer(judge=Odd()) as server:
        backend = connect(server, retries=0)
        odd, fine = backend.answer([Query.about("Is it a circle?", image), Query.about("Is it red?", image)])
    assert odd.p_yes is None and "OverflowError" in odd.error
    assert fine.p_yes is not None


@pytest.mark.parametrize(
    "answer", [(200, "<!doctype html><title>an app</title>"), (501, "not implemented"), (500, "no")]
)
def test_a_server_with_something_else_at_tokenize_is_asked_as_one_without(tiny, local, answer):
    queries = ask(3)
    with JudgeServer(judge=tiny, vllm=False, says={"/tokenize": answer}) as server:
        answers = connect(server).answer(queries)
    np.testing.assert_allclose(values(answers), values(local.answer(queries)), atol=5e-4)


@pytest.mark.parametrize(
    "text", ["</s>", "<image>", "<video>", "<quad>", "</box>", "<ref>", "[UNUSED_TOKEN_140]", "<think>"]
)
def test_tokens_of_other_chat_formats_are_not_asked_either(text):
    backend = HTTPBackend(None, url="http://127.0.0.1:9/v1", model="judge")
    ((row,), _) = backend.prepare([Query((f"a cat {text}",))])
    assert text in row.error


def test_a_key_is_cut_out_of_an_error_before_the_error_is_cut(tiny, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for said in (f"<html>{'.' * 50} Bearer {KEY}", f"{'.' * 270} Bearer {KEY}"):
        with JudgeServer(judge=tiny, says={"/v1/chat/completions": (200, said)}) as server:
            with pytest.raises(ServerError) as caught:
                Endpoint(EndpointSettings(server.url, server.model, "JUDGE_KEY", retries=0)).chat("yes", 1)
        assert KEY[:6] not in str(caught.value)


def test_the_key_is_sent_as_bearer_and_is_in_no_error(tiny, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", f"{KEY}x")
    with JudgeServer(judge=tiny, key=KEY) as server:
        backend = connect(server, api_key_env="JUDGE_KEY")
        values(backend.answer(ask(1)))
        assert server.keys == {f"Bearer {KEY}"} and backend.problems() == []
        wrong = connect(server, api_key_env="OTHER_KEY")
        (answer,) = wrong.answer(ask(1))
        (problem,) = wrong.problems()
        (without,) = connect(server).problems()
    assert "HTTP 401: Incorrect API key provided: Bearer [key]" in answer.error and KEY not in answer.error
    assert "OTHER_KEY" in problem and KEY not in problem
    assert "a request without a key" in without
    assert KEY not in repr(backend.endpoint.settings)


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_is_missing_or_none_is_told_before_anything_is_asked(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    options = {"backend": "http", "engine": {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "JUDGE_KEY"}}
    with pytest.raises(ConfigError, match=r"reward\[judge\].options.engine.api_key_env: .*JUDGE_KEY.*set it") as caught:
        build_scorer(ScorerSection(path=None, options=options))
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({}, "url: missing"),
        ({"url": "127.0.0.1:8000/v1", "model": "m"}, "url: .*give one like"),
        ({"url": "ftp://host/v1", "model": "m"}, "url: .*no http address"),
        ({"url": "http://me:secret@host/v1", "model": "m"}, "url: has a user or a password"),
        ({"url": "http://host/v1"}, "model: None is no name"),
        ({"url": "http://host/v1", "model": "m", "concurrency": 0}, "concurrency: 0"),
        ({"url": "http://host/v1", "model": "m", "timeout_s": 0}, "timeout_s: 0"),
        ({"url": "http://host/v1", "model": "m", "retries": -1}, "retries: -1"),
        ({"url": "http://host/v1", "model": "m", "extra": 3}, "extra: 3"),
        (
            {"url": "http://host/v1", "model": "m", "api_key_env": KEY},
            "api_key_env: not the name of an environment var",
        ),
        ({"url": "http://host/v1", "model": "m", "api_key_env": "hf_secret"}, "api_key_env: not the name"),
        ({"url": "http://host/v1", "model": "m", "api_key": KEY}, "api_key: no setting of backend http"),
    ],
)
def test_a_wrong_setting_is_told_without_touching_the_network(engine, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_backend("http", None, engine)
    assert "secret" not in str(caught.value) and KEY not in str(caught.value)


def test_problems_of_a_server_are_one_line_each_before_the_run(tiny):
    with JudgeServer(judge=tiny) as server:
        assert connect(server).problems() == []
        (line,) = connect(server, model="another").problems()
        assert "engine.model: " in line and "'another'" in line and server.model in line
    (line,) = connect(server, retries=0).problems()
    assert line.startswith("engine.url: ") and server.url in line and "\n" not in line


def test_the_path_is_the_models_name_where_none_is_set(tiny):
    with JudgeServer(judge=tiny) as server:
        backend = build_backend("http", server.model, url=server.url)
        assert backend.problems() == []
        values(backend.answer(ask(1)))


def test_further_fields_and_the_greedy_first_token_are_asked_for(tiny):
    with JudgeServer(judge=tiny) as server:
        values(connect(server, extra={"mm_processor_kwargs": {"max_patches": 6}}).answer(ask(1)))
        body = server.body
    assert body["mm_processor_kwargs"] == {"max_patches": 6}
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (0, 1, True, 20)
    spelt = tiny.tokenizer.convert_ids_to_tokens(body["logprob_token_ids"])
    assert set(spelt) <= {*YES, *NO} and {"yes", "no"} <= set(spelt)


def test_a_text_question_is_answered_in_words(tiny, local):
    with JudgeServer(judge=tiny) as server:
        said = connect(server).endpoint.chat("Does this image match?", 4)
    (expected,) = local.write([Query(("Does this image match?",))], 4)
    assert said == expected.text


def test_a_scorer_under_failures_of_a_fifth_of_its_calls_gives_the_same_values(tiny):
    requests = [ScoreRequest(f"r{i}", Prompt(str(i), text), image) for i, (text, image) in enumerate(pictures(40))]

    def scores(server: JudgeServer) -> tuple[list[float | None], dict[str, int], ScoreCounts]:
        engine = {"url": server.url, "model": server.model, "retries": 1, "backoff_s": 0.01}
        section = ScorerSection(path=None, batch_size=8, concurrency=2, retries=4, backoff_s=0.01)
        section.options = {"backend": "http", "engine": engine}
        scorer = build_scorer(section)
        given, counts = ScoreService(scorer, section).score(requests)
        return [score.value for score in given], scorer.backend.counts, counts

    with JudgeServer(judge=tiny) as server:
        expected, calm, _ = scores(server)
    with JudgeServer(judge=tiny, fail=FAILURES, share=0.2, hang_s=0.1) as server:
        found, counted, served = scores(server)
    assert None not in expected and served.missing == 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    failed = server.failed
    assert failed.total() > 3 and not any(name.startswith("failed") for name in calm)
    # Hanging for less than the timeout ends with the connection.
    assert counted.get("failed/connection", 0) == failed["close"] + failed["hang"] + failed["trickle"]
    assert counted.get("failed/not_finite", 0) == failed["nan"]
    for kind in ("http_500", "http_429", "malformed_json", "wrong_shape"):
        assert counted.get(f"failed/{kind}", 0) == failed[kind]
