"""What a row takes is counted from shapes; here it is held against the caches that are really made."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rlpipe.rollout.cache import Cache
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.memory import RowMemory, free_bytes, rows_that_fit
from rlpipe.rollout.programs import introspect
from rlpipe.types import Sampling
from tests.rollout.naive import TEXTS, rows

MEMORY = RowMemory(cache=80, hidden=10, logits=6, pixels=4, shared=1000)


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


@pytest.fixture
def held(monkeypatch) -> dict[str, int]:
    """Bytes of all caches that are alive, and the most there ever were."""
    alive = {"now": 0, "most": 0}

    sharers: Counter[int] = Counter()
    init = Cache.__init__

    def made(self, keys, *rest, **named):
        init(self, keys, *rest, **named)
        self.storage = keys.untyped_storage()
        if not sharers[self.storage.data_ptr()]:
            alive["now"] += 2 * self.storage.nbytes()
            alive["most"] = max(alive.values())
        sharers[self.storage.data_ptr()] += 1

    def gone(self):
        if hasattr(self, "storage"):  # not one of another test
            sharers[self.storage.data_ptr()] -= 1
            alive["now"] -= 2 * self.storage.nbytes() * (not sharers[self.storage.data_ptr()])

    monkeypatch.setattr(Cache, "__init__", made)
    monkeypatch.setattr(Cache, "__del__", gone, raising=False)
    return alive


@pytest.mark.parametrize("change", [{}, {"redraw_context": "reencoded"}, {"max_images": 3, "history": "all"}])
@pytest.mark.parametrize("limit", [4, 24])
def test_caches_never_take_more_than_a_rows_share(decoder, held, change, limit):
    sampling = Sampling(guidance=2.0, redraw="always", max_reflection_tokens=12, **change)
    longest = max(len(decoder.policy.templates.prompt(text)) for text in TEXTS)
    memory = RowMemory.of(decoder, sampling, longest, prompts=3)
    introspect(decoder, *rows(24, sampling), limit=limit)
    assert 0.4 * limit * memory.cache < held["most"] <= limit * memory.cache + memory.shared


def test_auto_takes_what_fits_and_a_number_is_taken_if_it_fits():
    assert rows_that_fit("auto", MEMORY, 1000 + 999) == 9
    assert rows_that_fit("9", MEMORY, 1000 + 999) == 9
    assert rows_that_fit("1", MEMORY, 1000 + 999) == 1


@pytest.mark.parametrize(
    ("wanted", "free", "words"),
    [
        ("10", 1999, "rollout.rows: 10 rows do not fit: .*; give 9 or fewer, or auto"),
        ("auto", 1099, "rollout.rows: auto, but not one row fits"),
        ("4", 0, "rollout.rows: 4, but not one row fits"),
    ],
)
def test_what_does_not_fit_is_told_with_the_number_that_does(wanted, free, words):
    with pytest.raises(ValueError, match=words):
        rows_that_fit(wanted, MEMORY, free)


def test_workers_of_a_host_share_its_memory():
    cpu = torch.device("cpu")
    assert 0 < 3 * free_bytes(cpu, workers=4) < free_bytes(cpu)


def test_longer_prompts_more_images_and_guidance_take_more(decoder):
    plain = RowMemory.of(decoder, Sampling(), 20)
    assert RowMemory.of(decoder, Sampling(), 40).row > plain.row
    assert RowMemory.of(decoder, Sampling(guidance=2.0), 20).cache > plain.cache
    assert RowMemory.of(decoder, Sampling(max_images=4, history="all"), 20).cache > plain.cache
    assert RowMemory.of(decoder, Sampling(), 20, reflects=False).row < plain.row
