"""Prompts as yes/no questions: where the questions come from, and what their answers add up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.backend import Answer, Query
from rlpipe.reward.decomposed import SUFFIX, DecomposedJudge
from rlpipe.reward.decomposition import Question, QuestionBook, in_order, masked, write_file
from rlpipe.reward.internvl import InternVLJudge
from rlpipe.reward.scorer import build_scorer, check_scorers, score_all
from rlpipe.reward.service import ScoreCounts, ScoreService
from rlpipe.types import Prompt, ScoreRequest
from tests.reward.http_server import JudgeServer, TinyJudge

JUDGE = "rlpipe/world/assets/judge"
DOG = [
    {"id": 3, "question": "Is the dog on the mat?", "parents": [1, 2], "category": "relation"},
    {"id": 1, "question": "Is there a dog?", "category": "entity"},
    {"id": 2, "question": "Is there a mat?", "category": "entity"},
]
LIST = json.dumps(
    [{"id": 1, "question": "Is there a red circle?"}, {"id": 2, "question": "Is it red?", "parents": [1]}]
)


@pytest.fixture(scope="module")
def book_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"prompt": "a dog on  a mat", "questions": DOG},
        {"id": "p7", "questions": [{"question": "Is there a red circle?"}, {"question": "Is there a blue square?"}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def ask(*prompts: Prompt) -> list[ScoreRequest]:
    return [ScoreRequest(f"r{i}", p, image(i)) for i, p in enumerate(prompts)]


def questions(*parents: tuple[int, ...]) -> list[Question]:
    return [Question(str(i), f"Q{i}?", tuple(map(str, above))) for i, above in enumerate(parents)]


class Answers:
    """Gives each question the P(yes) that stands for it, or fails it."""

    def __init__(self, p_yes: dict[str, float | None]) -> None:
        self.p_yes = p_yes

    def prepare(self, queries: list[Query]) -> None:
        return None

    def answer(self, queries: list[Query], prepared: Any = None) -> list[Answer]:
        found = [self.p_yes[query.texts[1].strip().removesuffix(SUFFIX)] for query in queries]
        return [Answer(error="timeout") if p is None else Answer(p_yes=p, mass=0.9) for p in found]


def judge(file: Path, p_yes: dict[str, float | None], **options) -> DecomposedJudge:
    scorer = DecomposedJudge(JUDGE, questions=file, device="cpu", **options)
    scorer.backend = Answers(p_yes)
    return scorer


def test_parents_come_before_their_children_whatever_the_order_of_the_file():
    assert [q.id for q in in_order(questions((2,), (), (1,)))] == ["1", "2", "0"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        tree = questions(*[tuple(rng.choice(i, min(i, 2), replace=False)) if i else () for i in range(8)])
        shuffled = [tree[i] for i in rng.permutation(8)]
        places = {q.id: i for i, q in enumerate(in_order(shuffled))}
        assert len(places) == 8 and all(places[p] < places[q.id] for q in tree for p in q.parents)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (questions((1,), (0,)), "question '0' depends on itself"),
        (questions((0,)), "question '0' depends on itself"),
        (questions((9,)), "parent '9' is the id of no question"),
        ([Question("0", "A?"), Question("0", "B?")], "two questions have the same id"),
    ],
)
def test_questions_that_cannot_be_ordered_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        in_order(rows)


def test_a_question_below_a_no_counts_zero_and_so_do_those_below_it():
    chain = in_order(questions((), (0,), (1,), ()))
    assert masked(chain, [0.9, 0.8, 0.7, 0.1]) == [0.9, 0.8, 0.7, 0.1]
    assert masked(chain, [0.5, 0.8, 0.7, 0.9]) == [0.5, 0.0, 0.0, 0.9]
    assert masked(chain, [0.9, 0.4, 0.7, 0.9]) == [0.9, 0.4, 0.0, 0.9]


def test_the_score_is_the_mean_over_all_questions(book_file):
    p_yes = {"Is there a dog?": 0.9, "Is there a mat?": 0.2, "Is the dog on the mat?": 0.7}
    request = ask(Prompt("x", "a dog on a mat"))
    (free,) = score_all(judge(book_file, p_yes), request)
    (bound,) = score_all(judge(book_file, p_yes, dependency=True), request)
    assert free.value == pytest.approx(1.8 / 3) and bound.value == pytest.approx(1.1 / 3)
    expected = {"questions": 3, "yes": 2 / 3, "lowest": 0.2, "mass": 0.9, "entity": 0.55, "relation": 0.7}
    assert free.parts == pytest.approx(expected) and bound.parts == pytest.approx(expected)


def test_one_question_without_an_answer_makes_the_score_missing(book_file):
    p_yes = {"Is there a dog?": 0.9, "Is there a mat?": None, "Is the dog on the mat?": 0.7}
    p_yes |= {"Is there a red circle?": 0.5, "Is there a blue square?": 1.0}
    prompts = Prompt("x", "a dog on a mat"), Prompt("p7", "whatever"), Prompt("p8", "unknown")
    first, second, third = score_all(judge(book_file, p_yes), ask(*prompts))
    assert first.missing and first.error == f"'Is there a mat?{SUFFIX}': timeout"
    assert second.value == 0.75
    assert third.missing and third.error == "no questions about 'unknown'"


def test_the_tiny_judge_answers_each_question_as_if_it_were_asked_alone(book_file):
    scorer = build_scorer(ScorerSection(scorer="decomposed", options={"questions": str(book_file)}), device="cpu")
    requests = ask(Prompt("p7", "a red circle and a blue square"), Prompt("y", "a dog on a mat"))
    scores = score_all(scorer, requests)
    assert scores == scorer.score_prepared(requests, scorer.prepare(requests))
    alone = InternVLJudge(JUDGE, question="{prompt}", device="cpu")
    for request, score, count in zip(requests, scores, (2, 3), strict=True):
        asked = [Prompt("q", q.text + SUFFIX) for q in scorer.book.find(request.prompt)]
        values = [s.value for s in alone.score([ScoreRequest("q", p, request.image) for p in asked])]
        assert len(values) == count and score.value == pytest.approx(np.mean(values), abs=1e-5)


def test_short_prompts_are_asked_the_one_question(book_file):
    prompt = Prompt("z", "a red circle")
    question = 'Does this image match the description "{prompt}"?'
    scorer = DecomposedJudge(JUDGE, question=question, questions=book_file, short_words=4, device="cpu")
    assert scorer.check([prompt, Prompt("long", "a very long prompt")]) == [
        "prompt 'long': no questions about 'a very long prompt'; add them to `questions`"
    ]
    (score,) = scorer.score(ask(prompt))
    (single,) = InternVLJudge(JUDGE, question=question, device="cpu").score(ask(prompt))
    assert score.value == pytest.approx(single.value, abs=1e-6)


def test_dpg_benchs_table_is_read_with_its_dependencies(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n"
        'a1,"A dog, on a mat.",,1,0,entity,whole,entity - whole (dog),Is there a dog?\n'
        'a1,"A dog, on a mat.",,3,"1, 2",relation,spatial,relation - spatial (dog),Is the dog on the mat?\n'
        'a1,"A dog, on a mat.",,2,0,entity,whole,entity - whole (mat),Is there a mat?\n'
        "a2,A cat.,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    )
    book = QuestionBook(file)
    found = book.find(Prompt("a1", "A dog, on a mat."))
    assert found == book.find(Prompt("other", "A dog,  on a mat."))
    assert [(q.id, q.parents, q.category) for q in found] == [
        ("1", (), "entity"),
        ("2", (), "entity"),
        ("3", ("1", "2"), "relation"),
    ]
    assert book.find(Prompt("a2", "A cat."))[0].text == "Is there a cat?"


def test_questions_about_another_text_are_not_asked_whatever_their_id(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [
        {"id": "1", "prompt": "a red dog", "questions": [{"question": "Is there a dog?"}]},
        {"id": "2", "prompt": "a blue cat", "questions": [{"question": "Is there a cat?"}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    scorer = DecomposedJudge(JUDGE, questions=file, device="cpu")
    assert scorer.book.find(Prompt("1", "a blue  cat"))[0].text == "Is there a cat?"
    (line,) = scorer.check([Prompt("2", "a green bird")])
    assert line.startswith("prompt '2': no questions about 'a green bird' (those of its id are about 'a blue cat')")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", "{", "q.jsonl:1: "),
        ("q.jsonl", '{"questions": []}', "q.jsonl:1: no `prompt` or `id`"),
        ("q.jsonl", '\n{"id": 1, "questions": []}', r"q.jsonl:2: questions is \[\]"),
        ("q.jsonl", '{"id": 1, "questions": [{"id": 1}]}', "has no text `question`"),
        ("q.jsonl", '{"id": 1, "questions": [{"question": "A?", "parents": [5]}]}', "parent '5' is the id of no"),
        ("q.csv", "a,b\n1,2\n", "q.csv: no column item_id"),
        ("q.txt", "", "is no .jsonl or .csv file"),
    ],
)
def test_a_bad_file_of_questions_is_one_line_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    section = ScorerSection(name="qa", scorer="decomposed", options={"questions": str(tmp_path / name)})
    with pytest.raises(ConfigError, match=rf"reward\[qa\].options.questions: .*{message}") as error:
        check_scorers([section])
    assert "\n" not in str(error.value)


def test_a_key_of_the_writer_that_is_not_set_is_told_with_its_field(tmp_path, monkeypatch):
    monkeypatch.delenv("WRITER_KEY", raising=False)
    writer = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "WRITER_KEY", "cache": str(tmp_path / "q")}
    section = ScorerSection(name="qa", scorer="decomposed", options={"writer": writer})
    with pytest.raises(ConfigError, match=r"reward\[qa\].options.writer.api_key_env: .*WRITER_KEY is not set"):
        build_scorer(section, device="cpu")


class Writes:
    """A text model that answers with one text, or with one for each prompt that is in it; counts its questions."""

    def __init__(self, words: str | dict[str, str]) -> None:
        self.words, self.asked = words, 0

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        text = body["messages"][-1]["content"]
        words = self.words if isinstance(self.words, str) else next(w for key, w in self.words.items() if key in text)
        return {"message": {"content": words}}


def writing(server: JudgeServer, cache: Path, **options) -> DecomposedJudge:
    writer = {"url": server.url, "model": server.model, "cache": str(cache), "retries": 0, "concurrency": 2}
    section = ScorerSection(scorer="decomposed", options={"writer": writer, **options})
    return build_scorer(section, device="cpu")


def test_a_text_model_writes_the_questions_of_a_prompt_once(tmp_path):
    model, cache = Writes(f"Here they are:\n```json\n{LIST}\n```"), tmp_path / "new" / "questions.jsonl"
    prompts = [Prompt(str(i), text) for i, text in enumerate(("a red circle", "two dogs", "a red  circle"))]
    with JudgeServer(judge=model) as server:
        first = writing(server, cache)
        assert first.check(prompts) == []
        values = [score.value for score in score_all(first, ask(*prompts))]
        assert None not in values and model.asked == 2
        again = writing(server, cache)
        assert [score.value for score in score_all(again, ask(*prompts))] == values
    assert model.asked == 2
    assert [q.parents for q in again.book.find(prompts[1])] == [(), ("1",)]
    assert len(cache.read_text().splitlines()) == 2


def test_replicas_that_asked_at_the_same_time_use_the_same_questions(tmp_path):
    cache, prompt = tmp_path / "questions.jsonl", Prompt("0", "a red circle")
    with JudgeServer(judge=Writes(LIST)) as server:
        first, second = writing(server, cache), writing(server, cache)
        other = json.dumps({"prompt": prompt.text, "questions": [{"id": 1, "question": "Is there a circle?"}]})
        first.writer.write([prompt])
        cache.write_text(cache.read_text() + other + "\n" + '{"prompt": "torn')
        second.writer._share([{"prompt": "two dogs", "questions": [{"id": 1, "question": "Are there two dogs?"}]}])
        first.writer._share([])
    assert first.book.find(prompt) == second.book.find(prompt) and len(second.book.find(prompt)) == 2
    assert first.book.find(Prompt("1", "two dogs")) == second.book.find(Prompt("1", "two dogs")) != ()


def test_a_prompt_that_no_questions_come_back_for_is_missing_and_asked_again_later(tmp_path):
    model = Writes({"two dogs": "I cannot do that.", "a red circle": LIST})
    prompts = Prompt("0", "two dogs"), Prompt("1", "a red circle")
    with JudgeServer(judge=model) as server:
        scorer = writing(server, tmp_path / "questions.jsonl")
        first, second = score_all(scorer, ask(*prompts))
        assert first.missing and "the answer is no JSON list" in first.error and "I cannot do that." in first.error
        assert second.value is not None
        model.words = LIST
        assert all(not score.missing for score in score_all(scorer, ask(*prompts)))


class WritesAndJudges(Writes):
    """The tiny judge where there is an image, else the text model."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.judge = TinyJudge()
        self.tokens = self.judge.tokens

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        asks_for_words = isinstance(body["messages"][-1]["content"], str)
        return super().answer(body) if asks_for_words else self.judge.answer(body)


def test_a_server_that_often_fails_changes_no_score(tmp_path):
    model = WritesAndJudges(LIST)
    requests = ask(*[Prompt(str(i), f"{i} red circles") for i in range(12)])

    def scores(cache: str, **failures: Any) -> tuple[list[float | None], ScoreCounts]:
        with JudgeServer(judge=model, **failures) as server:
            engine = {"url": server.url, "model": server.model, "retries": 0, "concurrency": 2}
            options = {"backend": "http", "engine": engine, "writer": {**engine, "cache": str(tmp_path / cache)}}
            section = ScorerSection(
                scorer="decomposed", path=None, batch_size=3, concurrency=2, retries=40, backoff_s=0.0, options=options
            )
            found, counts = ScoreService(build_scorer(section), section).score(requests)
            return [score.value for score in found], counts

    calm, without = scores("calm.jsonl")
    rough, counts = scores("rough.jsonl", fail=("http_500", "close", "malformed_json", "wrong_shape"), share=0.2)
    assert rough == pytest.approx(calm) and None not in calm
    assert (without.retries, counts.missing) == (0, 0) and counts.retries > 0


def test_a_writer_that_does_not_answer_is_named_before_the_run(tmp_path):
    with JudgeServer(judge=Writes(LIST)) as server:
        scorer = writing(server, tmp_path / "questions.jsonl")
    (problem,) = scorer.check([Prompt("0", "two dogs")])
    assert problem.startswith(f"writer.url: {server.url} gives no answer")


def test_questions_can_be_written_to_a_file_before_a_run(tmp_path):
    out, model = tmp_path / "questions.jsonl", Writes({"dogs": "no", "circle": LIST})
    prompts = [Prompt("0", "a red circle"), Prompt("1", "two dogs"), Prompt("2", "a blue circle")]
    with JudgeServer(judge=model) as server:
        failed = list(write_file(prompts, out, url=server.url, model=server.model, retries=0, concurrency=1))
    assert len(failed) == 1 and failed[0].startswith("'two dogs': no questions from")
    book = QuestionBook(out)
    assert [book.find(p) is not None for p in prompts] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "questions: null; give a .jsonl or .csv file of them, or a writer"),
        ({"questions": "q.jsonl", "short_words": -1}, "short_words: -1; give a whole number from 0"),
        ({"questions": "q.jsonl", "dependency": "yes"}, "dependency: 'yes'; give true or false"),
        ({"writer": {"url": "http://localhost/v1"}}, "; give {url: http://127.0.0.1:8000/v1, model: name}"),
        ({"writer": {"url": "ftp://a", "model": "m"}}, "writer.url: 'ftp://a' is no http address"),
        ({"writer": {"url": "http://a/v1", "model": "m", "modle": 1}}, "writer: 'modle' is none of cache, max_tokens"),
        ({"questions": "q.jsonl", "backend": "abacus"}, "backend: 'abacus' is unknown"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(options, message):
    with pytest.raises(ConfigError) as error:
        check_scorers([ScorerSection(name="qa", scorer="decomposed", options=options)])
    assert message in str(error.value) and "\n" not in str(error.value)
