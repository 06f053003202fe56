"""Log-probs and entropies in chunks: what they are, their gradients, and the memory that they take."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rlpipe.learn.heads import score_group
from rlpipe.learn.layout import Distribution, Group
from rlpipe.policy.guidance import guide
from rlpipe.rollout.sampling import truncate

DISTRIBUTIONS = {
    "plain image": Distribution("image"),
    "guided image": Distribution("image", guidance=3.0),
    "warm image": Distribution("image", guidance=2.0, temperature=1.4),
    "truncated image": Distribution("image", guidance=2.0, temperature=0.8, top_k=300, top_p=0.9),
    "verdict": Distribution("verdict", temperature=1.3),
    "text": Distribution("text"),
    "truncated text": Distribution("text", temperature=0.7, top_k=20),
}


class Identity:
    """Heads whose logits are the hidden states themselves; Yes is token 2, No token 0."""

    templates = SimpleNamespace(yes=2, no=0)

    def image_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    text_logits = image_logits


def group_of(drawn: Distribution, num: int, num_tokens: int, num_hidden: int) -> Group:
    """`num` tokens read anywhere in a row of `num_hidden`."""
    generator = torch.Generator().manual_seed(1)
    at, twin = (torch.randint(num_hidden, (num,), generator=generator) for _ in range(2))
    target = torch.randint(num_tokens, (num,), generator=generator)
    return Group(drawn, at, twin if drawn.guidance != 1.0 else None, target)


def whole(policy, hidden: torch.Tensor, group: Group, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same at once, in the words of torch.distributions."""
    drawn = group.distribution
    if drawn.head == "image":
        twin = None if group.unconditional is None else policy.image_logits(hidden[group.unconditional])
        logits = guide(policy.image_logits(hidden[group.at]), twin, drawn.guidance, mode)
    else:
        logits = policy.text_logits(hidden[group.at])
    if drawn.head == "verdict":
        logits = logits[:, [policy.templates.no, policy.templates.yes]]
    logits = logits / drawn.temperature
    kept = truncate(logits, drawn.top_k, drawn.top_p)
    kept = torch.where(torch.nn.functional.one_hot(group.target, logits.shape[-1]).bool(), logits, kept)
    distribution = torch.distributions.Categorical(logits=kept)
    return distribution.log_prob(group.target), distribution.entropy()


@pytest.mark.parametrize("mode", ["guided", "scaled"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_chunks_give_the_values_and_gradients_of_the_whole(tiny_policy, name, mode):
    drawn = DISTRIBUTIONS[name]
    sizes = {"image": tiny_policy.codebook_size, "verdict": 2, "text": 60}
    group = group_of(drawn, 23, sizes[drawn.head], 40)
    weights = list(tiny_policy.part("lm_head" if drawn.head != "image" else "generation_head").parameters())
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factor = torch.linspace(-1, 2, 23)

    def backward(scores):
        logprobs, entropies = scores
        gradients = torch.autograd.grad((factor * logprobs + entropies).sum(), [hidden, *weights])
        return [logprobs, entropies, *gradients]

    expected = backward(whole(tiny_policy, hidden, group, mode))
    for chunk in (1, 5, 22, 23, 1000):
        found = backward(score_group(tiny_policy, hidden, group, mode, entropy=True, chunk=chunk))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        logprobs, entropies = score_group(tiny_policy, hidden, group, mode, chunk=5)
    assert entropies is None
    torch.testing.assert_close(logprobs, expected[0], atol=1e-5, rtol=1e-5)


def test_hand_computed_pairs_temperatures_verdicts_and_sets():
    hidden = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 9.0, math.log(3)], [0.0, 1.0, 2.0]])

    def score(drawn: Distribution, at: int, target: int, twin: int | None = None, mode: str = "guided"):
        pair = None if twin is None else torch.tensor([twin])
        group = Group(drawn, torch.tensor([at]), pair, torch.tensor([target]))
        return [value.item() for value in score_group(Identity(), hidden, group, mode, entropy=True)]

    # u + 2 (c - u) = (-1, 2, 0); officially half of that
    total = math.exp(-1) + math.exp(2) + 1
    assert score(Distribution("image", 2.0), 0, 1, twin=1)[0] == pytest.approx(2 - math.log(total))
    total = math.exp(-0.5) + math.exp(1) + 1
    assert score(Distribution("image", 2.0), 0, 1, twin=1, mode="scaled")[0] == pytest.approx(1 - math.log(total))
    # Yes against No at 3 to 1; over a temperature of 1/2 at 9 to 1
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert score(Distribution("verdict"), 2, 1) == pytest.approx([math.log(0.75), entropy])
    assert score(Distribution("verdict", temperature=0.5), 2, 0)[0] == pytest.approx(math.log(0.1))
    # the two likeliest of three, and a sampled third that stays allowed
    odds = math.e / (1 + math.e)
    assert score(Distribution("text", top_k=2), 3, 2)[0] == pytest.approx(math.log(odds))
    entropy = -odds * math.log(odds) - (1 - odds) * math.log(1 - odds)
    assert score(Distribution("text", top_k=2), 3, 2)[1] == pytest.approx(entropy)
    total = 1 + math.e + math.exp(2)
    assert score(Distribution("text", top_k=2), 3, 0)[0] == pytest.approx(-math.log(total))


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made under it that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: kept for key, kept in self.live.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


class Wide(Identity):
    """A text head over a vocabulary of 102,400."""

    def __init__(self) -> None:
        self.head = torch.nn.Linear(4, 102_400, bias=False)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def test_the_memory_of_both_passes_does_not_grow_with_the_sequence():
    policy, width, peaks = Wide(), 4, {}
    for length in (16, 64, 128):
        for chunk in (8, 1000):
            hidden = torch.randn(length, width, requires_grad=True)
            group = Group(Distribution("text"), torch.arange(length), None, torch.arange(length))
            with LiveBytes() as memory:
                logprobs, entropies = score_group(policy, hidden, group, "guided", entropy=True, chunk=chunk)
                (logprobs + entropies).sum().backward()
            policy.head.weight.grad = None
            peaks[length, chunk] = memory.peak
    logits = 8 * 102_400 * 4
    assert peaks[128, 8] - peaks[16, 8] < 0.1 * logits
    assert peaks[128, 1000] - peaks[16, 1000] > 14 * 2 * logits  # so the measure sees what a whole row takes


class Dropping(Identity):
    """A text head with dropout before it, as an adapter has; it keeps what its forward passes let through."""

    def __init__(self) -> None:
        self.weight = torch.randn(7, 4, requires_grad=True)
        self.passed: list[torch.Tensor] = []

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        dropped = torch.nn.functional.dropout(hidden, 0.5)
        self.passed.append(dropped.detach())
        return dropped @ self.weight.T


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    torch.manual_seed(0)
    policy, hidden, target = Dropping(), torch.randn(12, 4), torch.arange(12) % 7
    group = Group(Distribution("text"), torch.arange(12), None, target)
    logprobs, _ = score_group(policy, hidden, group, "guided", chunk=5)
    passed = torch.cat(policy.passed)
    assert (passed == 0).any() and len(policy.passed) == 3
    (found,) = torch.autograd.grad(logprobs.sum(), policy.weight)
    assert len(policy.passed) == 6  # all chunks were made again
    same = (passed @ policy.weight.T).log_softmax(-1)[torch.arange(12), target].sum()
    torch.testing.assert_close(found, torch.autograd.grad(same, policy.weight)[0])


def test_logits_are_float32_under_autocast(tiny_policy):
    hidden = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny_policy.text_logits(hidden), tiny_policy.image_logits(hidden)
    for logits in found:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
    # from weights as the sampler has them, in bfloat16
    weight = tiny_policy.part("lm_head").weight.bfloat16().float()
    torch.testing.assert_close(found[0], hidden.bfloat16().float() @ weight.T, atol=1e-6, rtol=1e-6)
