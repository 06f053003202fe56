"""A learner of random weights, and the work that nobody can avoid in a step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference_rows import reference_loss
from sizes import build
from torch import nn
from trajectories import SPANS, Example

from rlpipe.learn.learner import Learner
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import add_adapters
from rlpipe.schema import Config


class RandomLearner(Learner):
    """The learner of a policy of `sizes.py` in place of a checkpoint's, and the official learner's way beside its own.

    learner = RandomLearner(config, "small", "cpu")
    learner.forward_backward(examples)          # gradients
    learner.reference_rows(examples, rows=2)    # the same gradients
    """

    def __init__(self, config: Config, size: str, device: str) -> None:
        self.size = size
        super().__init__(config, device=device)

    def _load_policy(self) -> JanusPolicy:
        section = self.config.policy
        policy = build(self.size, self.dtype if section.lora.rank else torch.float32, str(self.device))
        if section.lora.rank:
            add_adapters(policy, section, self.config.seed)
        else:
            policy.set_trainable(section.trainable)
        return policy

    def forward_backward(self, examples: Sequence[Example]) -> float:
        """The loss; gradients are left with the parameters."""
        self.strategy.discard()
        items = [example.item for example in examples]
        stats = self._accumulate(items, SPANS * len(items), True, self.config.loss.kl_beta)
        return stats.values()["loss/total"]

    def reference_rows(self, examples: Sequence[Example], rows: int) -> float:
        """The same by the official learner's forwards, `rows` trajectories in each, Yes beside No as they come."""
        self.strategy.discard()
        total = 0.0
        for start in range(0, len(examples), rows):
            chunk, beta = examples[start : start + rows], self.config.loss.kl_beta
            loss, _ = self.strategy.forward(reference_loss, chunk, self.options, beta, SPANS * len(examples))
            self.strategy.backward(loss, last=start + rows >= len(examples))
            total += loss.item()
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU; a parameter that took no part is left out."""
        return {n: p.grad.to("cpu", copy=True) for n, p in self.parameters.items() if p.grad is not None}


@dataclass(frozen=True)
class Work:
    """tokens: inputs of the language model. operations: multiplications and additions of forward and backward."""

    tokens: int
    operations: float


def unavoidable_work(learner: RandomLearner, examples: Sequence[Example]) -> Work:
    """What every learner of these trajectories has to compute, without padding and without recomputation.

    Per trajectory one drawing sequence, its unconditional twin under guidance, and one looking sequence, each up to
    the last input that is read; a redrawing that sees other codes or constants cannot share the first one's rows and
    has a pair of its own. Per token 6 operations for each trained weight of the layers and 4 for each frozen one, whose
    own gradient nobody needs; per sequence of T tokens 6 T^2 x heads x head size in each layer for attention, half of
    the square being masked; a head's weights for the tokens that are scored; the frozen tower forward. Embeddings,
    aligners and norms are not counted.
    """
    policy, config = learner.policy, learner.policy.janus.config.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_attention_heads * head_dim * config.num_hidden_layers
    layers = _per_token(policy.part("language_model").layers)
    tower = 2 * sum(p.numel() for p in policy.part("vision_model").parameters()) * policy.num_image_tokens
    heads = {"image": _per_token(policy.part("generation_head")), "text": _per_token(policy.part("lm_head"))}
    tokens, operations = 0, 0.0
    for example in examples:
        for length, head, scored in _sequences(learner, example):
            tokens += length
            operations += length * layers + attention * length**2 + scored * heads[head]
        operations += tower
    return Work(tokens, operations)


def _per_token(module: nn.Module) -> int:
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in module.parameters() if p.dim() > 1)


def _sequences(learner: RandomLearner, example: Example) -> list[tuple[int, str, int]]:
    """Inputs, head and number of scored tokens of each sequence."""
    policy, options, trajectory = learner.policy, learner.options, example.item.trajectory
    templates, image = policy.templates, policy.num_image_tokens
    prompt, words = len(templates.prompt(trajectory.prompt.text)), len(trajectory.segments[1])
    spoken = words if options.train_eos else words - 1
    look = (prompt + image + len(templates.look) + spoken - 1, "text", spoken)
    first = (prompt + image - 1, "image", image)
    pair = 1 if trajectory.sampling.guidance == 1.0 or options.logits == "conditional" else 2
    if example.said_yes:
        return [*[first] * pair, look]
    whole = prompt + image + len(templates.look) + words - 1 + len(templates.redraw) + image - 1
    alone = options.context == "constant" or trajectory.segments[0].context_ids is not None
    drawn = [first, (whole, "image", image)] if alone else [(whole, "image", 2 * image)]
    return [*drawn * pair, look]
