"""vLLM as the judge's engine, in this process, in a reward actor and as a server, against the transformers backend."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from rlpipe.config import ScorerSection
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.near_miss import Case, near_miss_cases
from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.backend import Answer, Backend, Query, build_backend
from rlpipe.reward.convert import Plan, write
from rlpipe.reward.editing import EditingJudge
from rlpipe.reward.question import fill
from rlpipe.reward.scorer import build_scorer
from rlpipe.rollout.decoder import Decoder
from rlpipe.types import Prompt, ScoreRequest
from roles.reward import RewardActor, calls_at_once
from tests.reward import originals

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

JUDGE = "rlpipe/world/assets/judge"
SMALL = {"kv_cache_memory_bytes": 2**28}
START_S = 300.0


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Images of the tiny world under prompts that they match and that they just miss."""
    prompts = load_prompts("rlpipe/world/assets/prompts_test.jsonl")[::50]
    return near_miss_cases(Decoder(JanusPolicy.load("rlpipe/world/assets/policy")), prompts)


@pytest.fixture(scope="module")
def queries(cases: list[Case]) -> list[Query]:
    """About one image of one tile; about two, between texts; about one of several tiles; about none."""
    asked = [Query.about(fill(ScorerSection().question, case.prompt.text), case.image) for case in cases]
    first, second, wide = cases[0].image, cases[2].image, np.concatenate([c.image for c in cases[:4:2]], axis=1)
    asked.append(Query(("Image - 1 : ", "\nImage - 2 : ", "\nare there two squares in this image ?"), (first, second)))
    asked.append(Query(("", "\n", "\nare there two squares in this image ?"), (second, first)))
    asked.append(Query.about("is there a red circle ?", wide))
    asked.append(Query(("Please respond with yes or no .",)))
    return asked


@pytest.fixture(scope="module")
def transformers() -> Backend:
    return build_backend("transformers", JUDGE)


@pytest.fixture(scope="module")
def vllm() -> Iterator[Backend]:
    backend = build_backend("vllm", JUDGE, **SMALL)
    yield backend
    backend.close()


def probabilities(answers: list[Answer]) -> np.ndarray:
    assert [a.error for a in answers] == [None] * len(answers)
    return np.array([a.p_yes for a in answers])


def test_the_engine_in_this_process_gives_the_p_yes_of_transformers(vllm, transformers, queries):
    expected, got = transformers.answer(queries), vllm.answer(queries)
    assert probabilities(expected).std() > 0.3
    np.testing.assert_allclose(probabilities(got), probabilities(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose([a.mass for a in got], [a.mass for a in expected], rtol=0, atol=1e-5)


def test_prepared_repeated_and_shuffled_queries_get_the_same_answers(vllm, queries):
    order = np.random.default_rng(0).permutation(2 * len(queries)) % len(queries)
    mixed = [queries[i] for i in order]
    expected = probabilities(vllm.answer(queries))[order]
    np.testing.assert_allclose(probabilities(vllm.answer(mixed, vllm.prepare(mixed))), expected, rtol=0, atol=1e-5)


def test_the_engine_writes_the_words_of_transformers(vllm, transformers, queries):
    texts = [answer.text for answer in vllm.write(queries, 6)]
    assert texts == [answer.text for answer in transformers.write(queries, 6)]
    assert all(text.startswith(("yes", "no")) for text in texts[:-1])


def test_what_the_engine_cannot_take_is_missing_with_the_reason_and_the_rest_is_answered(vllm, cases):
    image, good = cases[0].image, Query.about("is there a red circle ?", cases[0].image)
    answers = vllm.answer([Query.about("red " * 300, image), good, Query(("", "", "", " ?"), (image,) * 3)])
    assert "tokens" in answers[0].error and "limit_mm_per_prompt" in answers[2].error
    assert answers[1].p_yes == pytest.approx(vllm.answer([good])[0].p_yes, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode"),
        ({"max_num_batched_tokens": 64}, "max_num_batched_tokens"),
        ({"no_such_keyword": 1}, "no_such_keyword"),
        ({"device": "cuda:1"}, "num_gpus"),
    ],
)
def test_a_wrong_setting_is_named_before_the_model_is_loaded(settings, words):
    with pytest.raises(ValueError, match=words):
        build_backend("vllm", JUDGE, **settings)


def test_edits_are_scored_as_by_transformers(cases):
    pairs = zip(cases[::2], cases[2::2], strict=False)
    requests = [
        ScoreRequest("", Prompt("", "make the circle red"), after.image, before.image) for before, after in pairs
    ]
    expected = EditingJudge(JUDGE).score(requests)
    judge = EditingJudge(JUDGE, backend="vllm", engine=SMALL)
    for got, score in zip(judge.score(requests), expected, strict=True):
        assert got.parts == pytest.approx(score.parts, abs=1e-5) and got.value == pytest.approx(score.value, abs=1e-5)
    judge.backend.close()


REMOTE_CODE = """
from transformers import PretrainedConfig, Qwen2Config

class Config(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **rest):
        self.vision_config = PretrainedConfig(initializer_factor=1.0, num_channels=3, **(vision_config or {}))
        self.llm_config = self.text_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**rest)
"""


def test_the_original_layout_is_served_where_its_code_is_trusted_as_its_converted_form_by_transformers(tmp_path):
    folder, converted = tmp_path / "original", tmp_path / "converted"
    changes = {"llm__hidden_size": 128, "llm__rope_scaling": None, "architectures": ["InternVLChatModel"]}
    originals.build(folder, "qwen2", **changes)
    (folder / "configuration.py").write_text(REMOTE_CODE)
    write(Plan.of(folder), converted)
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_backend("vllm", folder, **SMALL)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 56, 3), np.uint8)
    queries = [Query.about("the red circle", image) for image in (*pixels, *pixels[:, :, :28])]
    expected = probabilities(build_backend("transformers", converted).answer(queries))
    backend = build_backend("vllm", folder, trust_remote_code=True, **SMALL)
    np.testing.assert_allclose(probabilities(backend.answer(queries)), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3
    backend.close()


@pytest.mark.ray
def test_a_reward_actor_on_vllm_gives_the_scores_of_transformers_and_leaves_no_process(cases):
    requests = [ScoreRequest(str(i), case.prompt, case.image) for i, case in enumerate(cases)]
    section = ScorerSection(options={"backend": "vllm", "engine": SMALL}, num_cpus=1.0, threads=1, timeout_s=START_S)
    expected = [score.value for score in build_scorer(ScorerSection()).score(requests)]
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        actor = ray.remote(RewardActor).options(num_cpus=1, **calls_at_once(section)).remote(section)
        calls = [actor.score.remote(requests[:10]), actor.score.remote(requests[10:])]
        records = ray.get(calls, timeout=2 * START_S)
        got = [score.value for record in records for score in record.scores]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=30)
        family = descendants(pid)
        ray.kill(actor)
        deadline = time.monotonic() + 30
        while (left := [p for p in (pid, *family) if os.path.exists(f"/proc/{p}")]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
    finally:
        ray.shutdown()


def descendants(pid: int) -> list[int]:
    """The process's children and theirs, as Linux lists them."""
    children = [int(p) for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]
    return children + [p for child in children for p in descendants(child)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a vLLM server of the tiny judge on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "launch/serve_judge.py", JUDGE, "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        process.wait(30)
        assert not answers(f"http://127.0.0.1:{port}/health")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def test_a_vllm_server_gives_the_http_backend_the_p_yes_of_transformers(server, transformers, queries):
    http = build_backend("http", None, url=server, model="judge")
    one_tile = [q for q in queries if all(image.shape == (48, 48, 3) for image in q.images)]
    expected, got = transformers.answer(one_tile), http.answer(one_tile)
    np.testing.assert_allclose(probabilities(got), probabilities(expected), rtol=0, atol=1e-5)
    # The server's text of a first word begins with the space that the tokenizer puts between words.
    words = [answer.text.strip() for answer in http.write(one_tile, 6)]
    assert words == [answer.text for answer in transformers.write(one_tile, 6)]


def test_a_vllm_server_cuts_tiles_as_the_other_backends_do(server, transformers, queries):
    http = build_backend("http", None, url=server, model="judge")
    tiled = [q for q in queries if any(image.shape != (48, 48, 3) for image in q.images)]
    # The server's bicubic rounds some pixels to the next grey level.
    assert tiled
    np.testing.assert_allclose(
        probabilities(http.answer(tiled)), probabilities(transformers.answer(tiled)), rtol=0, atol=1e-2
    )
