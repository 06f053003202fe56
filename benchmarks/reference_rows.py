"""The official learner's way through a trajectory: five rows in three padded forwards, every head on every position.

    span 1   prompt | image 1                                              and its unconditional twin
    span 2   prompt | pixels of image 1 | look | reflection
    span 3   prompt | image 1 | look | reflection | redraw | image 2       and its twin; after Yes (v1) span 1 again,
                                                                           padded to the width of those that said No

The graphs of all three are held until one backward. Logits are combined over whole rows and cut afterwards. What is
computed is what the learner computes: its distributions, contexts, positions and loss; how is the official code's. Rows
are padded on the right and not on the left, which costs the same. For trajectories of credit v1 with at most two
images that were drawn without temperature, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from trajectories import Example

from rlpipe.learn.replay import ReplayOptions
from rlpipe.policy.guidance import guide
from rlpipe.policy.janus import JanusPolicy


@dataclass
class _Row:
    """One sequence: embeddings [T, D] by piece, positions, and the span at its end that is scored."""

    policy: JanusPolicy
    constant: bool
    pieces: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    next_position: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def add(self, embeddings: torch.Tensor, room: int | None = None, context: bool = True) -> _Row:
        """Append; `room`: positions that it takes, if not its length."""
        count = len(embeddings)
        self.pieces.append(embeddings.detach() if context and self.constant else embeddings)
        self.positions.append(torch.arange(self.next_position, self.next_position + count, device=embeddings.device))
        self.next_position += count if room is None else room
        return self

    def text(self, ids, room: int | None = None, context: bool = True) -> _Row:
        ids = torch.as_tensor(ids, device=self.policy.device)
        return self.add(self.policy.embed_text(ids), room, context)

    def codes(self, codes, context: bool = True) -> _Row:
        codes = torch.as_tensor(codes, device=self.policy.device)
        return self.add(self.policy.embed_codes(codes[None])[0], context=context)


def reference_loss(
    policy: JanusPolicy, examples: Sequence[Example], options: ReplayOptions, kl_beta: float, denominator: float
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The loss of some of a batch's trajectories, and float32 [T] log-probs by span and trajectory.

    denominator: of the whole batch; the three spans of a trajectory count one each.
    """
    spans = [_first(policy, examples, options), _reflections(policy, examples, options)]
    spans.append(_final(policy, examples, options))
    loss = torch.zeros((), device=policy.device)
    for number, logprobs in enumerate(spans):
        for example, current in zip(examples, logprobs, strict=True):
            segment = (0, 1, example.final)[number]
            known = torch.from_numpy(example.item.ref_logprobs[segment]).to(current.device)
            gap = known[: len(current)] - current
            divergence = gap.exp() - gap - 1
            ratio = (current - current.detach()).exp()
            loss = loss + (kl_beta * divergence - ratio * example.advantages[number]).mean() / denominator
    return loss, spans


def _first(policy: JanusPolicy, examples: Sequence[Example], options: ReplayOptions) -> list[torch.Tensor]:
    rows = [_drawing(policy, example, blank, options) for example in examples for blank in (False, True)]
    return _image_logprobs(policy, rows, examples, [0] * len(examples), options)


def _final(policy: JanusPolicy, examples: Sequence[Example], options: ReplayOptions) -> list[torch.Tensor]:
    rows = [
        _drawing(policy, example, blank, options, again=not example.said_yes)
        for example in examples
        for blank in (False, True)
    ]
    return _image_logprobs(policy, rows, examples, [example.final for example in examples], options)


def _drawing(policy: JanusPolicy, example: Example, blank: bool, options: ReplayOptions, again: bool = False) -> _Row:
    """prompt | image 1, or `again` up to image 2."""
    trajectory, templates = example.item.trajectory, policy.templates
    prompt = templates.prompt(trajectory.prompt.text)
    first = trajectory.segments[0]
    row = _Row(policy, options.context == "constant").text(templates.blank(prompt) if blank else prompt)
    if not again:
        return row.codes(first.token_ids, context=False)
    row.codes(first.token_ids if first.context_ids is None else first.context_ids).text(templates.look)
    words = trajectory.segments[1].token_ids[:-1]
    fixed = trajectory.sampling.reflection_room == "fixed"
    row.text(words, trajectory.sampling.max_reflection_tokens if fixed else None).text(templates.redraw)
    return row.codes(trajectory.segments[2].token_ids, context=False)


def _reflections(policy: JanusPolicy, examples: Sequence[Example], options: ReplayOptions) -> list[torch.Tensor]:
    templates, rows = policy.templates, []
    for example in examples:
        trajectory = example.item.trajectory
        row = _Row(policy, options.context == "constant").text(templates.prompt(trajectory.prompt.text))
        image = torch.from_numpy(example.item.images[0])[None].to(policy.device)
        row.add(policy.embed_pixels(image)[0]).text(templates.look)
        rows.append(row.text(trajectory.segments[1].token_ids, context=False))
    logits = policy.text_logits(_hidden(policy, rows))
    results = []
    for row, whole, example in zip(rows, logits, examples, strict=True):
        ids = torch.from_numpy(example.item.trajectory.segments[1].token_ids).to(policy.device)
        end = len(row)
        own = whole[end - len(ids) - 1 : end - 1]
        logprobs = own.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        if options.verdict == "restricted":
            choices = own[0, [templates.no, templates.yes]].log_softmax(-1)
            logprobs = torch.cat([choices[int(example.said_yes)][None], logprobs[1:]])
        results.append(logprobs if options.train_eos else logprobs[:-1])
    return results


def _image_logprobs(
    policy: JanusPolicy,
    rows: list[_Row],
    examples: Sequence[Example],
    segments: Sequence[int],
    options: ReplayOptions,
) -> list[torch.Tensor]:
    """Log-probs of the image that each pair of rows ends with."""
    logits = policy.image_logits(_hidden(policy, rows))
    guidance = examples[0].item.trajectory.sampling.guidance
    guided = guide(logits[0::2], logits[1::2], guidance, options.logits)
    results = []
    for row, pair, example, segment in zip(rows[0::2], guided, examples, segments, strict=True):
        codes = torch.from_numpy(example.item.trajectory.segments[segment].token_ids).to(policy.device)
        end = len(row)
        own = pair[end - len(codes) - 1 : end - 1]
        results.append(-F.cross_entropy(own, codes, reduction="none"))
    return results


def _hidden(policy: JanusPolicy, rows: Sequence[_Row]) -> torch.Tensor:
    """Last hidden states [B, L, D] of all rows in one forward."""
    embeddings = pad_sequence([torch.cat(row.pieces) for row in rows], batch_first=True)
    positions = pad_sequence([torch.cat(row.positions) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    mask = torch.arange(embeddings.shape[1], device=policy.device) < lengths[:, None]
    return policy.part("language_model")(
        inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state
