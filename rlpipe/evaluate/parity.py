"""Parity with the official code: this project's sampler, replay, credit and loss against golden vectors.

A golden directory holds `policy/` and `reference/` (checkpoints), `golden.json` and the decoded images as PNG:

    special_ids, yes_id, no_id   token ids by string
    greedy                       captions through draw, look, redraw with top-k 1
    learner                      one group of sampled trajectories, and for each rule v1, v2, v3 the segments' log-probs
                                 under policy and reference, advantages, loss and gradient norms
    parts                        understanding embeddings and VQ codes of group_<i>_image_1.png, VQ decoding of the
                                 first learner images

Everything is computed in float32. Sizes, captions, group size and verdicts are those of the directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.learn.advantage import FINALS, SPANS, Credited, assign_credit, extend, reference_items
from rlpipe.learn.loss import policy_loss, token_terms
from rlpipe.learn.replay import ReplayOptions, lay_out, segment_logprobs, token_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.pixels import load_image
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.schema import CreditSection
from rlpipe.types import Prompt, Rollout, Sampling, Segment, Trajectory

OFFICIAL = ReplayOptions(logits="scaled", verdict="full", train_eos=False, context="constant")
"""How the official learner scores tokens."""
PARTS = {
    "language_model": ("language_model", "lm_head"),
    "gen_head": ("generation_head",),
    "gen_embed": ("generation_embeddings",),
    "gen_aligner": ("generation_aligner",),
    "aligner": ("aligner",),
}
"""Original names of the trained parts, and this project's parts in each."""
EXACT, LEVELS, LOGPROBS, LOSS, NORMS = 0.0, 1.0, 2e-4, 1e-5, 1e-3
"""Bounds: differing tokens; grey levels of a pixel (rounding that falls to the other side); log-probs and other
float32 values; loss and advantages; gradient norms, relative."""


class GoldenError(ValueError):
    """A golden directory that lacks something or contradicts itself; one line that names it."""


@dataclass(frozen=True)
class Check:
    """One compared part: its largest difference (NaN counts as a failure) and what it may be."""

    name: str
    difference: float
    bound: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound


class Golden:
    """A golden directory; values by dotted key, with an error that names what is missing.

    golden = Golden("data/golden")
    golden("learner.guidance_scale")      # 5.0
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "golden.json"
        if not self.file.is_file():
            raise GoldenError(f"--golden: no golden.json in {self.folder.resolve()}; give a golden directory")
        try:
            self.values = json.loads(self.file.read_text("utf-8"))
        except ValueError as error:
            raise GoldenError(f"{self.file}: not JSON: {error}") from None

    def __call__(self, key: str, within: Any = None) -> Any:
        value, path = self.values if within is None else within, []
        for part in key.split("."):
            path.append(part)
            if not isinstance(value, Mapping) or part not in value:
                raise GoldenError(f"{self.file}: no {'.'.join(path)} (of {key}); the directory is incomplete")
            value = value[part]
        return value

    def image(self, name: str, policy: JanusPolicy) -> np.ndarray:
        """uint8 [H, W, 3] of a PNG of the policy's size."""
        return load_image(self.folder / name, policy.image_size)

    def policy(self, name: str) -> JanusPolicy:
        return JanusPolicy.load(self.folder / name)


def check_parity(folder: str | Path) -> Iterator[Check]:
    """Compare part after part. Raises GoldenError, and what loading a checkpoint or an image raises."""
    golden = Golden(folder)
    policy = golden.policy("policy").requires_grad_(False)
    yield from _check_ids(golden, policy)
    yield from _check_parts(golden, policy)
    yield from _check_greedy(golden, policy)
    reference = golden.policy("reference").requires_grad_(False)
    rollouts = _rollouts(golden, policy)
    for version in golden("learner.versions"):
        yield from _check_version(golden, version, rollouts, policy, reference)


def _check_ids(golden: Golden, policy: JanusPolicy) -> Iterator[Check]:
    """Token ids that the tokenizer is asked for, and the framed captions."""
    templates = policy.templates
    found = [templates.tokenizer.convert_tokens_to_ids(token) for token in golden("special_ids")]
    known = [*golden("special_ids").values(), golden("yes_id"), golden("no_id")]
    yield Check("special tokens", _differing(known, [*found, templates.yes, templates.no]), EXACT, "tokens")
    prompts = [golden("prompt_ids", row) for row in golden("greedy")]
    own = [templates.prompt(golden("caption", row)) for row in golden("greedy")]
    yield Check("prompts", _count(prompts, own), EXACT, "tokens")


@torch.no_grad()
def _check_parts(golden: Golden, policy: JanusPolicy) -> Iterator[Check]:
    """The two ways into the model and the way out, each alone."""
    expected = np.asarray(golden("parts.understanding"), np.float32)
    images = torch.from_numpy(np.stack([golden.image(f"group_{i}_image_1.png", policy) for i in range(len(expected))]))
    yield Check("understanding embeddings", _gap(expected, policy.embed_pixels(images)), LOGPROBS, "")
    codes = golden("parts.vq_codes")
    yield Check("vq encode", _count(codes, policy.encode_pixels(images[: len(codes)]).tolist()), EXACT, "tokens")
    floats = np.asarray(golden("parts.vq_decode"), np.float32)
    drawn = torch.tensor(golden("learner.image_1")[: len(floats)])
    yield Check("vq decode", _gap(floats, policy.decode_floats(drawn)), LOGPROBS, "")
    shown = np.stack([golden.image(f"group_{i}_image_1.png", policy) for i in range(len(drawn))])
    yield Check("vq decode, PNG", _gap(shown, policy.decode_codes(drawn)), LEVELS, "grey levels")


def _sampling(golden: Golden, **changes: Any) -> Sampling:
    """How the golden trajectories were drawn; their longest reflection is the limit that cut the longest ones."""
    lengths = [len(golden("reflection", row)) for row in golden("greedy")]
    lengths += [len(row) for row in golden("learner.reflection")]
    return Sampling(
        guidance=float(golden("learner.guidance_scale")),
        max_reflection_tokens=max(lengths),
        redraw="always",
        redraw_context="reencoded",
        reflection_room="group",
        **changes,
    )


def _check_greedy(golden: Golden, policy: JanusPolicy) -> Iterator[Check]:
    """Whole trajectories by this project's sampler."""
    rows = golden("greedy")
    sampling = _sampling(golden, image_top_k=1, text_top_k=1)
    prompts = [Prompt(str(i), golden("caption", row)) for i, row in enumerate(rows)]
    rollouts = introspect(Decoder(policy), prompts, [sampling] * len(rows), [prompt.id for prompt in prompts])
    for number, name in enumerate(("image_1", "reflection", "image_2")):
        own = [rollout.trajectory.segments[number].token_ids.tolist() for rollout in rollouts]
        yield Check(f"greedy {name}", _count([golden(name, row) for row in rows], own), EXACT, "tokens")
    verdicts = [rollout.trajectory.verdicts[0] for rollout in rollouts]
    yield Check("greedy verdicts", _differing([golden("said_yes", row) for row in rows], verdicts), EXACT, "verdicts")
    for image in range(2):
        names = [f"greedy_{i}_image_{image + 1}.png" for i in range(len(rows))]
        if all((golden.folder / name).is_file() for name in names):
            gaps = [_gap(golden.image(n, policy), r.images[image]) for n, r in zip(names, rollouts, strict=True)]
            yield Check(f"greedy image_{image + 1}, PNG", max(gaps), LEVELS, "grey levels")


def _rollouts(golden: Golden, policy: JanusPolicy) -> list[Rollout]:
    """The group's trajectories as golden.json has them; nobody here sampled them."""
    prompt, sampling = Prompt("golden", golden("learner.caption")), _sampling(golden)
    pixels = [golden.image(f"group_{i}_image_1.png", policy) for i in range(int(golden("learner.group")))]
    contexts = policy.encode_pixels(torch.from_numpy(np.stack(pixels))).cpu().numpy()
    second = torch.tensor(golden("learner.image_2"))
    redrawn = policy.decode_codes(second).cpu().numpy()
    rollouts = []
    for i, (image, context) in enumerate(zip(pixels, contexts, strict=True)):
        words, room = _reflection(golden, i, policy.templates.eos), len(golden("learner.reflection")[i])
        first = Segment("image", np.array(golden("learner.image_1")[i]), context_ids=context)
        segments = (first, Segment("text", words, room=room), Segment("image", second[i].numpy()))
        verdict = bool(words[0] == policy.templates.yes)
        if verdict != golden("learner.said_yes")[i]:
            raise GoldenError(f"{golden.file}: learner.said_yes[{i}] contradicts the reflection's first token")
        cut = bool(words[-1] != policy.templates.eos)
        trajectory = Trajectory(f"golden-{i}", prompt, segments, sampling, verdicts=(verdict,), truncated=(cut,))
        rollouts.append(Rollout(trajectory, (image, redrawn[i])))
    return rollouts


def _reflection(golden: Golden, row: int, eos: int) -> np.ndarray:
    """A row's reflection, with its end-of-sentence token and without the padding behind it."""
    ids, mask = np.array(golden("learner.reflection")[row]), np.array(golden("learner.reflection_mask")[row])
    count = int(mask.sum())
    if count == 0 or not mask[:count].all() or (count < len(ids) and ids[count] != eos):
        raise GoldenError(f"{golden.file}: learner.reflection_mask[{row}] is not words, then end-of-sentence and pads")
    return ids[: count + 1]


def _check_version(
    golden: Golden, version: Mapping[str, Any], rollouts: Sequence[Rollout], policy: JanusPolicy, reference: JanusPolicy
) -> Iterator[Check]:
    """Log-probs, advantages, loss and gradients of one rule."""
    rule = golden("version", version)
    rollouts = extend(rollouts, rule)
    items = reference_items(rollouts)
    own = segment_logprobs(policy, items, OFFICIAL)
    theirs = segment_logprobs(reference, items, OFFICIAL, context_policy=policy)
    finals = [FINALS[rule](rollout.trajectory).segment for rollout in rollouts]
    for number, (span, expected) in enumerate(zip(SPANS, golden("segments", version), strict=True)):
        places = finals if span == "final" else [number] * len(rollouts)
        tokens = [r.trajectory.segments[p].token_ids for r, p in zip(rollouts, places, strict=True)]
        masks = [np.array(row, bool) for row in golden("mask", expected)]
        wanted = [np.array(row)[mask].tolist() for row, mask in zip(golden("ids", expected), masks, strict=True)]
        have = [row[: mask.sum()].tolist() for row, mask in zip(tokens, masks, strict=True)]
        yield Check(f"{rule} {span} tokens", _count(wanted, have), EXACT, "tokens")
        for name, found in (("policy", own), ("reference", theirs)):
            pairs = zip(golden(f"{name}_logprobs", expected), masks, found, places, strict=True)
            gaps = [_gap(np.array(row)[mask], known[place][: mask.sum()]) for row, mask, known, place in pairs]
            yield Check(f"{rule} {span} {name} log-probs", float(np.max(gaps)), LOGPROBS, "")
    yield from _check_update(golden, version, rollouts, theirs, policy)


def _check_update(
    golden: Golden, version: Mapping[str, Any], rollouts: Sequence[Rollout], references: list, policy: JanusPolicy
) -> Iterator[Check]:
    """Credit, loss and gradients on log-probs of this project's own."""
    rule = golden("version", version)
    scores = list(zip(golden("learner.rewards_image_1"), golden("learner.rewards_image_2"), strict=True))
    scores = [row[: len(rollout.images)] for row, rollout in zip(scores, rollouts, strict=True)]
    credited: Credited = assign_credit(rollouts, scores, [0] * len(rollouts), CreditSection(rule=rule), references)
    for span, expected in zip(SPANS, golden("segments", version), strict=True):
        gap = _gap(golden("advantages", expected), credited.advantages[span])
        yield Check(f"{rule} {span} advantages", gap, LOSS, "")
    policy.set_trainable(part for parts in PARTS.values() for part in parts)
    policy.zero_grad(set_to_none=True)
    replay = lay_out(credited.batch.items, policy.templates, OFFICIAL)
    terms = token_terms(credited.batch.items, replay)
    logprobs = token_logprobs(policy, replay).logprobs
    clip, beta = float(golden("learner.epsilon")), float(golden("learner.beta"))
    loss, _ = policy_loss(logprobs, terms, credited.batch.denominator, clip, beta)
    yield Check(f"{rule} loss", abs(loss.item() - golden("loss", version)), LOSS, "")
    loss.backward()
    for name, expected in golden("grad_norm", version).items():
        if name not in PARTS:
            raise GoldenError(f"{golden.file}: grad_norm of {name!r}; the parts are {', '.join(PARTS)}")
        gap = abs(_norm(policy, PARTS[name]) - expected) / max(abs(expected), 1e-12)
        yield Check(f"{rule} gradient norm {name}", gap, NORMS, "relative")
    policy.zero_grad(set_to_none=True)
    policy.requires_grad_(False)


def _norm(policy: JanusPolicy, parts: Sequence[str]) -> float:
    grads = [p.grad for part in parts for p in policy.part(part).parameters() if p.grad is not None]
    return float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()) if grads else 0.0


def _gap(expected: Any, found: Any) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    found = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    expected = np.asarray(expected)
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max(initial=0.0))


def _count(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """Differing tokens of all rows; a row of another length counts what it lacks or has too many."""
    return float(sum(_differing(one, two) for one, two in zip(expected, found, strict=True)))


def _differing(expected: Sequence, found: Sequence) -> float:
    same = sum(a == b for a, b in zip(expected, found, strict=False))
    return float(max(len(expected), len(found)) - same)
