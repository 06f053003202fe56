"""A real tiny judge behind an OpenAI-compatible server on loopback, which fails as it is told to.

    with JudgeServer(fail=("http_500",), share=0.2) as server:
        HTTPBackend(None, url=server.url, model=server.model)

    python tests/reward/http_server.py --port 8001 --fail http_500 hang --share 0.2

It has what `vllm serve` has of routes and fields, as far as a judge is asked for it: /v1/models,
/v1/chat/completions (logprobs, top_logprobs, logprob_token_ids, return_prompt_text) and /tokenize.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from rlpipe.paths import resolve_path
from rlpipe.reward import tiling
from rlpipe.reward.backend import Query
from rlpipe.reward.internvl import InternVLBackend, JudgeFormat, answer_logits

JUDGE = "rlpipe/world/assets/judge"
FAILURES = ("http_500", "http_429", "hang", "trickle", "close", "malformed_json", "wrong_shape", "nan")


class TinyJudge:
    """The tiny judge as a chat model: the distribution of its first answer token, and its words."""

    def __init__(self, path: str = JUDGE) -> None:
        self.backend = InternVLBackend(path, device="cpu")
        self.tokenizer = self.backend.format.tokenizer
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The choice of a chat completion; ValueError if the prompt is too long."""
        system, query = read_messages(body["messages"], body["ends_lines"])
        with self._lock, torch.inference_mode():
            self.backend.format = JudgeFormat(self.tokenizer, self.backend.model.config, system)
            if not body.get("logprobs"):
                return {"message": {"content": self.backend.write([query], body["max_tokens"])[0].text}}
            logprobs = self._first_token(query)
        best = int(logprobs.argmax())
        ids = body.get("logprob_token_ids") or logprobs.topk(min(body["top_logprobs"], len(logprobs))).indices.tolist()
        top = [self._entry(i, logprobs) for i in dict.fromkeys([*ids, best] if body.get("logprob_token_ids") else ids)]
        token = self._entry(best, logprobs)
        return {"message": {"content": token["token"]}, "logprobs": {"content": [{**token, "top_logprobs": top}]}}

    def tokens(self, text: str) -> dict[str, Any]:
        with self._lock:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return {"count": len(ids), "tokens": ids, "token_strs": self.tokenizer.convert_ids_to_tokens(ids)}

    def _first_token(self, query: Query) -> torch.Tensor:
        form = self.backend.format
        tokens = form.tokens(query.texts, form.num_tiles(query.images))
        if len(tokens) > form.max_length:
            raise ValueError(f"the prompt is {len(tokens)} tokens, the context {form.max_length}")
        ids, mask = form.pad([tokens])
        pixels = tiling.normalise(torch.from_numpy(form.tiles(query.images))) if query.images else None
        return answer_logits(self.backend.model, ids, mask, pixels)[0].log_softmax(-1)

    def _entry(self, token: int, logprobs: torch.Tensor) -> dict[str, Any]:
        return {"token": self.tokenizer.decode([token]), "logprob": float(logprobs[token])}


def read_messages(messages: list[dict[str, Any]], ends_lines: bool) -> tuple[str, Query]:
    """System text and query of the messages, as a chat template reads them."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    content = messages[-1]["content"]
    texts, images = [""], []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            texts[-1] += part["text"]
        else:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")))
            texts.append("\n" if ends_lines else "")
    return system, Query(tuple(texts), tuple(images))


class JudgeServer:
    """The server, running between `with` and its end.

    fail:    kinds of failure (FAILURES); a request that fails does so in a random one of them.
    share:   of the chat requests that fail, at random; every: each so many-th fails instead, 1 is all of them.
    heal:    how many failures there are at most; None is no limit.
    hang_s:  how long a hanging request stays without an answer, a trickling one without its end.
    delay_s: added to every answer.
    retry_after: header of "http_429".
    key:     demanded as bearer; None demands none.
    vllm:    whether there are /tokenize, logprob_token_ids and return_prompt_text.
    ends_lines: whether the chat template breaks the line after an image, as those of published InternVL checkpoints do.
    says:    by path a status and a text that are the answer to whatever is asked there.

    requests, failed (by kind), most_at_once: what there was of chat requests. keys: the authorizations sent.
    read, body: the texts of each, as the template reads them; what the last one sent.
    """

    def __init__(
        self,
        fail: tuple[str, ...] = (),
        share: float = 0.0,
        every: int = 0,
        heal: int | None = None,
        hang_s: float = 30.0,
        delay_s: float = 0.0,
        retry_after: str = "0.05",
        key: str | None = None,
        vllm: bool = True,
        ends_lines: bool = True,
        says: Mapping[str, tuple[int, str]] | None = None,
        seed: int = 0,
        port: int = 0,
        judge: TinyJudge | None = None,
    ) -> None:
        unknown = sorted(set(fail) - set(FAILURES))
        if unknown:
            raise ValueError(f"fail: {unknown[0]!r} is unknown; take some of {', '.join(FAILURES)}")
        self.fail, self.share, self.every, self.heal = fail, share, every, heal
        self.hang_s, self.delay_s, self.retry_after, self.key, self.vllm = hang_s, delay_s, retry_after, key, vllm
        self.ends_lines, self.says = ends_lines, says or {}
        self.model = str(resolve_path(JUDGE))
        self.requests, self.most_at_once = 0, 0
        self.failed: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.read: list[tuple[str, ...]] = []
        self.body: dict[str, Any] = {}
        self.closing = threading.Event()
        self._random, self._lock, self._now, self._judge = random.Random(seed), threading.Lock(), 0, judge
        handler = type("Handler", (_Handler,), {"judge_server": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @cached_property
    def judge(self) -> TinyJudge:
        return self._judge or TinyJudge()

    def __enter__(self) -> Self:
        self.judge  # noqa: B018  (loaded before the first request, so that none waits for it)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def begin(self) -> str | None:
        """Counts a chat request; the kind of failure that it is to have, or None."""
        with self._lock:
            self.requests += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            chosen = self.requests % self.every == 0 if self.every else self._random.random() < self.share
            if not self.fail or not chosen or (self.heal is not None and self.failed.total() >= self.heal):
                return None
            kind = self._random.choice(self.fail)
            self.failed[kind] += 1
            return kind

    def end(self) -> None:
        with self._lock:
            self._now -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave a hanging request are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    judge_server: JudgeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.judge_server
        if self._refused():
            return
        if self.path == "/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": server.model, "object": "model"}]})
        else:
            self._reply(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        server = self.judge_server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        if self.path in server.says:
            status, text = server.says[self.path]
            return self._write(status, text.encode())
        if body.get("model") != server.model:
            self._reply(404, {"error": {"message": f"The model {body.get('model')!r} does not exist."}})
        elif self.path == "/tokenize" and server.vllm:
            self._reply(200, server.judge.tokens(body["prompt"]))
        elif self.path != "/v1/chat/completions":
            self._reply(404, {"detail": "Not Found"})
        elif body.get("logprob_token_ids") and not server.vllm:
            self._reply(400, {"error": {"message": "Unknown parameter: 'logprob_token_ids'."}})
        elif body.get("return_prompt_text"):
            texts = read_messages(body["messages"], server.ends_lines)[1].texts
            self._reply(
                200, {"choices": [], "prompt_text": f"<|im_start|>user\n{'<IMG_CONTEXT>'.join(texts)}<|im_end|>"}
            )
        else:
            kind = server.begin()
            try:
                time.sleep(server.delay_s)
                self._complete(body, kind)
            finally:
                server.end()

    def _refused(self) -> bool:
        server, sent = self.judge_server, self.headers.get("Authorization")
        server.keys.add(sent)
        if server.key is None or sent == f"Bearer {server.key}":
            return False
        self._reply(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
        return True

    def _complete(self, body: dict[str, Any], kind: str | None) -> None:
        server = self.judge_server
        if kind in ("hang", "close"):
            if kind == "hang":
                server.closing.wait(server.hang_s)
            self.close_connection = True
        elif kind == "trickle":
            self._trickle(server.hang_s)
        elif kind == "http_500":
            self._reply(500, {"error": {"message": "the engine is dead"}})
        elif kind == "http_429":
            self._reply(429, {"error": {"message": "slow down"}}, {"Retry-After": server.retry_after})
        elif kind == "malformed_json":
            self._write(200, b'{"choices": [{"message": {"con')
        elif kind == "wrong_shape":
            self._reply(200, {"choices": []})
        else:
            server.body = body
            server.read.append(read_messages(body["messages"], server.ends_lines)[1].texts)
            try:
                choice = server.judge.answer({**body, "ends_lines": server.ends_lines})
            except ValueError as error:
                return self._reply(400, {"error": {"message": str(error)}})
            if kind == "nan" and "logprobs" in choice:
                choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = float("nan")
            self._reply(200, {"object": "chat.completion", "model": server.model, "choices": [choice]})

    def _trickle(self, seconds: float) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.judge_server.closing.wait(0.02):
            self.wfile.write(b" ")
            self.wfile.flush()
        self.close_connection = True

    def _reply(self, status: int, payload: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._write(status, json.dumps(payload).encode(), headers)

    def _write(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--fail", nargs="*", default=(), choices=FAILURES)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--delay-s", type=float, default=0.0)
    options = parser.parse_args()
    settings = {**vars(options), "fail": tuple(options.fail)}
    with JudgeServer(**settings) as server:
        print(f"{server.model} at {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
