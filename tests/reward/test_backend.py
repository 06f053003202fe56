"""The contract of backends, and the transformers one on a small random InternVL of the real class."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpipe.reward.backend import Answer, Query, build_backend, check_backend, distinct
from rlpipe.reward.internvl import InternVLBackend, InternVLJudge, answer_logits
from rlpipe.reward.reason import Explainer
from rlpipe.types import Prompt, ScoreRequest
from rlpipe.world.models import build_judge

QUESTION = 'Does this image match the description "a photo of a {}"?'
COLORS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    model, tokenizer = build_judge(layers=2, vision_layers=1)
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backend(path) -> InternVLBackend:
    return build_backend("transformers", path, batch_size=3, device="cpu")


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(count: int) -> list[Query]:
    """Questions of several lengths about images of one to seven tiles."""
    sizes = [(48, 48), (48, 144), (100, 100)]
    words = [" ".join(COLORS[: 1 + i % 3]) for i in range(count)]
    return [Query.about(QUESTION.format(words[i]), draw(*sizes[i % 3], seed=i)) for i in range(count)]


def test_log_probs_become_the_share_of_yes_and_the_mass_of_both():
    answer = Answer.from_logprobs([math.log(0.3), math.log(0.1), -math.inf], [math.log(0.1)])
    assert answer.p_yes == pytest.approx(0.8) and answer.mass == pytest.approx(0.5)
    tiny = Answer.from_logprobs([-2000.0], [-2000.0])
    assert tiny.p_yes == pytest.approx(0.5) and tiny.mass == 0.0


def test_an_answer_without_yes_or_no_or_with_nan_is_an_error_and_no_probability():
    for yes, no in (([], []), ([-math.inf], [-math.inf]), ([math.nan], [-1.0]), ([0.0, math.inf], [-1.0])):
        answer = Answer.from_logprobs(yes, no)
        assert answer.p_yes is None and answer.mass is None and answer.error


def test_queries_are_equal_by_their_words_and_pixels():
    image, other = draw(8, 8), draw(8, 8, seed=1)
    one = Query.about("Is it red?", image)
    queries = [one, Query.about("Is it red?", other), Query.about("Is it red?", image.copy()), Query.about("?", image)]
    kept, places = distinct(queries)
    assert places == [0, 1, 0, 2] and kept[0] is one
    assert distinct([one, Query.about("Is it red?", image.reshape(4, 16, 3))])[1] == [0, 1]


def test_texts_that_do_not_fit_around_the_images_are_refused():
    with pytest.raises(ValueError, match="texts: 1 around 1 images; give one more than images"):
        Query(("what?",), (draw(8, 8),))


def test_p_yes_and_mass_are_those_of_the_whole_model_on_one_query(backend):
    queries = ask(6)
    answers = backend.answer(queries)
    yes, no = backend.format.yes_ids, backend.format.no_ids
    for query, answer in zip(queries, answers, strict=True):
        tiles = backend.format.tiles(query.images)
        ids = torch.tensor([backend.format.tokens(query.texts, [len(tiles)])])
        assert (ids == backend.model.config.image_token_id).sum() == 36 * len(tiles)
        with torch.no_grad():
            logits = backend.model(input_ids=ids, pixel_values=backend.format.pixels(tiles)).logits[0, -1]
        shares = logits.double().softmax(-1)
        mass = float(shares[yes].sum() + shares[no].sum())
        assert answer.mass == pytest.approx(mass, rel=1e-4)
        assert answer.p_yes == pytest.approx(float(shares[yes].sum()) / mass, abs=1e-6)


def test_a_wide_image_is_seen_in_tiles_and_with_one_tile_allowed_it_is_squeezed(path):
    (wide,) = [Query.about(QUESTION.format("red"), draw(48, 144))]
    squeezed = build_backend("transformers", path, device="cpu", max_tiles=1)
    tiled = build_backend("transformers", path, device="cpu", max_tiles=12)
    assert len(tiled.format.tiles(wide.images)) == 4 and len(squeezed.format.tiles(wide.images)) == 1
    assert abs(tiled.answer([wide])[0].p_yes - squeezed.answer([wide])[0].p_yes) > 1e-5


def test_what_was_prepared_gives_the_same_answers(backend):
    queries = ask(8)
    before = backend.prepare_seconds
    prepared = backend.prepare(queries)
    spent = backend.prepare_seconds
    assert backend.answer(queries, prepared) == backend.answer(queries)
    assert before < spent < backend.prepare_seconds


def test_preparing_is_done_once_when_it_was_done_ahead(backend):
    prepared = backend.prepare(ask(4))
    spent = backend.prepare_seconds
    backend.answer(ask(4), prepared)
    assert backend.prepare_seconds == spent


def test_equal_queries_are_in_the_model_once(backend, monkeypatch):
    rows = []
    model = backend.model.model.language_model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: rows.append(len(kw["inputs_embeds"])) or forward(**kw))
    one, two = ask(2)
    answers = backend.answer([one, two, Query.about(one.texts[1][1:], one.images[0].copy()), one])
    assert sum(rows) == 2
    assert answers[0] == answers[2] == answers[3] != answers[1]


def test_an_image_is_in_the_vision_tower_once_however_much_is_asked_about_it(path, monkeypatch):
    backend = build_backend("transformers", path, batch_size=8, device="cpu")
    wide, other, plain = draw(48, 144), draw(48, 48, seed=1), Query(("Does a circle match?",))
    queries = [Query.about(QUESTION.format(color), image) for color in COLORS for image in (wide, other)]
    queries += [plain, Query(("Is", "like", "?"), (other, wide))]
    alone = [backend.answer([query])[0].p_yes for query in queries]
    tiles = []
    tower = backend.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda **kw: tiles.append(len(kw["pixel_values"])) or forward(**kw))
    together = backend.answer(queries)
    assert tiles == [4 + 1]
    np.testing.assert_allclose([answer.p_yes for answer in together], alone, atol=1e-6)


def test_the_next_batch_is_made_while_one_is_in_the_model(path, monkeypatch):
    backend = build_backend("transformers", path, batch_size=1, device="cpu")
    made = [threading.Event() for _ in range(3)]
    unmade, awaited = iter(made), iter(made[1:])
    tiles, forward = backend.format.tiles, backend.model.model.language_model.forward

    def cutting(images):
        next(unmade).set()
        return tiles(images)

    def waiting(**inputs):
        following = next(awaited, None)
        assert following is None or following.wait(20)
        return forward(**inputs)

    monkeypatch.setattr(backend.format, "tiles", cutting)
    monkeypatch.setattr(backend.model.model.language_model, "forward", waiting)
    assert all(answer.error is None for answer in backend.answer(ask(3)))
    assert next(awaited, None) is None


def test_several_threads_get_the_answers_of_one(backend):
    queries = ask(9)
    expected = backend.answer(queries)
    with ThreadPoolExecutor(3) as threads:
        for answers in threads.map(backend.answer, [queries[i:] for i in range(9)]):
            got = [answer.p_yes for answer in answers]
            np.testing.assert_allclose(got, [e.p_yes for e in expected[-len(got) :]], atol=1e-6)


def test_words_do_not_depend_on_the_batch_and_begin_with_the_likeliest_token(backend):
    queries = ask(4)
    together = [answer.text for answer in backend.write([*queries, queries[0]], 5)]
    assert together == [backend.write([q], 5)[0].text for q in [*queries, queries[0]]]
    tiles = backend.format.tiles(queries[0].images)
    ids, mask = backend.format.pad([backend.format.tokens(queries[0].texts, [len(tiles)])])
    with torch.no_grad():
        first = answer_logits(backend.model, ids, mask, backend.format.pixels(tiles)).argmax(-1)
    assert together[0].startswith(backend.format.tokenizer.decode(first, skip_special_tokens=True))


def test_a_question_without_an_image_is_answered(backend):
    (answer,) = backend.answer([Query(("Does a circle match?",))])
    assert 0 < answer.p_yes < 1
    assert backend.write([Query(("Does a circle match?",))], 3)[0].text is not None


def test_a_question_too_long_for_the_model_is_an_error_and_its_mates_are_answered(backend):
    long = Query.about("red " * 300, draw(48, 48))
    short = ask(1)[0]
    answers = backend.answer([long, short])
    assert answers[0].p_yes is None and "tokens, the judge takes 256" in answers[0].error
    assert answers[1].p_yes == pytest.approx(backend.answer([short])[0].p_yes)


def test_a_failed_answer_is_a_missing_score_with_its_reason(path):
    judge = InternVLJudge(path, "Is it {prompt}?", device="cpu")
    image = draw(48, 48)
    requests = [ScoreRequest("0", Prompt("0", "red " * 300), image), ScoreRequest("1", Prompt("1", "red"), image)]
    failed, fine = judge.score(requests)
    assert failed.missing and "the judge takes 256" in failed.error
    assert 0 < fine.value < 1 and 0 < fine.parts["mass"] < 1
    silent, said = Explainer(judge, "Is it {prompt}?", tokens=3).explain(requests)
    assert silent is None and isinstance(said, str)


def test_no_number_of_a_model_gone_bad_becomes_a_score(path):
    judge = InternVLJudge(path, "Is it {prompt}?", device="cpu")
    with torch.no_grad():
        judge.backend.model.lm_head.weight.fill_(torch.nan)
    (score,) = judge.score([ScoreRequest("0", Prompt("0", "red"), draw(48, 48))])
    assert score.missing and "not finite" in score.error


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("onnx", {}, "backend: 'onnx' is unknown; take one of transformers, vllm, http"),
        ("transformers", {"batch_size": 0}, "batch_size: 0 is no whole number of at least 1"),
        ("transformers", {"max_tiles": 1.5}, "max_tiles: 1.5 is no whole number of at least 1"),
        ("transformers", {"dtype": "float16"}, "dtype: 'float16' is not one of float32, bfloat16"),
        ("transformers", {"device": "gpu"}, "device: 'gpu' is unknown; take auto, cpu, cuda or cuda:1"),
        ("transformers", {"device": None}, "device: None is no text"),
        ("transformers", {"url": "x"}, "engine: backend transformers got an unexpected keyword argument 'url'"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(path, name, settings, line):
    with pytest.raises(ValueError, match=line):
        check_backend(name, path, settings)
    with pytest.raises(ValueError, match=line):
        build_backend(name, path, **settings)


def test_a_judge_names_the_settings_of_its_engine(path):
    check = InternVLJudge.check_keywords
    check(path=path, question="Is it {prompt}?")
    with pytest.raises(ValueError, match="^engine: 3 is no mapping"):
        check(path=path, engine=3)
    with pytest.raises(ValueError, match="^engine.dtype: dtype is a setting of every backend; set it beside engine"):
        check(path=path, engine={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="^path: none; give the folder"):
        check(path=None)


def test_a_gpu_that_is_not_there_is_refused(path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device: 'cuda', but this process sees no GPU"):
        build_backend("transformers", path, device="cuda")
