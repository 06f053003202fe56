"""The learner: replay, loss and one optimiser step, on one process or on many with the same result.

The caller starts the process group (gloo on CPU, nccl on GPU) before it builds a learner with `world_size`
above 1, and every rank calls every method at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from rlpipe.learn.layout import Replay, ReplayOptions, lay_out, num_tokens
from rlpipe.learn.loss import Variant, policy_loss, token_terms
from rlpipe.learn.packing import micro_batches
from rlpipe.learn.recompute import compile_layers, recompute_layers
from rlpipe.learn.reference import base_logprobs, lacks_reference, reference_options, with_reference
from rlpipe.learn.replay import replay_logprobs
from rlpipe.learn.schedule import learning_rate
from rlpipe.learn.stats import Stats
from rlpipe.learn.strategy import DTYPES, make_strategy
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import adapted_names, add_adapters, base_is_reference, merged_weights
from rlpipe.schema import Config
from rlpipe.types import TrainItem


class LearnerError(RuntimeError):
    """A step that was refused before it touched a weight."""


class Learner:
    """Trains a policy, or adapters of it, on `TrainItem`s; float32 master weights whatever the compute type.

    learner = Learner(config)
    metrics = learner.step(items, denominator=len(items), step=0, total_steps=100)
    learner.policy_version    # 1
    tensors = learner.weights()    # by checkpoint name
    """

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1, device: str | None = None) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        wants_gpu = config.learner.num_gpus > 0 and torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if wants_gpu else "cpu"))
        if config.policy.dtype not in DTYPES:
            raise ValueError(f"policy.dtype: {config.policy.dtype!r} is none of {', '.join(DTYPES)}")
        self.dtype = DTYPES[config.policy.dtype]
        self.options = ReplayOptions.from_config(config.loss)
        self.variant = Variant.from_config(config.loss)
        self.policy = self._load_policy()
        recompute_layers(self.policy, config.learner.activation_checkpointing)
        if config.learner.compile:
            compile_layers(self.policy)
        self.strategy = make_strategy(config, self.policy, self.device, world_size)
        self.parameters = self.strategy.parameters
        self.policy_version = 0

    def _load_policy(self) -> JanusPolicy:
        """Float32 masters of what trains; under adapters the rest stays in the compute type."""
        section, device = self.config.policy, str(self.device)
        if section.lora.rank == 0:
            policy = JanusPolicy.from_config(self.config, device=device)
            policy.set_trainable(section.trainable)
            return policy
        policy = JanusPolicy.from_config(self.config, self.dtype, device)
        add_adapters(policy, section, self.config.seed)
        return policy

    def step(
        self,
        items: Sequence[TrainItem],
        denominator: float,
        step: int,
        total_steps: int,
        fresh: bool = True,
        lr_scale: float = 1.0,
        kl_scale: float = 1.0,
        entropy_weights: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """One optimiser step on this rank's share of a batch; the metrics are those of all ranks together.

        denominator: of the whole batch, the same on every rank.
        fresh:       all items were sampled by this very policy version. Where not, `mismatch/*` is measured on those
                     whose trajectory says so.
        lr_scale, kl_scale: of the scheduled learning rate and of loss.kl_beta.
        entropy_weights: of the entropies of image and text in the loss; None: it has no such term.

        Raises LearnerError, with the weights untouched, if the loss or a gradient is not finite or the
        sampler's log-probs are further than loss.max_mismatch from the learner's.
        """
        if not denominator > 0:
            raise ValueError(f"denominator: {denominator} is not positive; an empty batch cannot be trained on")
        self.strategy.discard()
        stats = self._accumulate(items, denominator, fresh, kl_scale * self.config.loss.kl_beta, entropy_weights)
        norm = self.strategy.gradient_norm()
        metrics = stats.values()
        self._refuse(metrics, norm.item())
        rate = lr_scale * learning_rate(self.config.learner, step, total_steps)
        self.strategy.update(rate, norm)
        self.policy_version += 1
        own = {
            "train/lr": rate,
            "train/grad_norm": norm.item(),
            "train/policy_version": float(self.policy_version),
        }
        return {**metrics, **own}

    def _accumulate(
        self,
        items: Sequence[TrainItem],
        denominator: float,
        fresh: bool,
        kl_beta: float,
        entropy_weights: tuple[float, float] | None = None,
    ) -> Stats:
        """Gradients of all micro-batches; returns the stats of all ranks."""
        section, loss_section = self.config.learner, self.config.loss
        stats, with_entropy = Stats(), entropy_weights is not None
        batches, by_base = self._micro_batches(items), self._asks_base(items)
        for number, indices in enumerate(batches):
            chunk = [items[index] for index in indices]
            replay = lay_out(chunk, self.policy.templates, self.options)
            if by_base:
                chunk = self._with_base_reference(chunk)
            terms = token_terms(chunk, replay, loss_section.verdict_ce_share).to(self.device)
            logprobs, entropies, anchor = self.strategy.forward(
                _anchored_logprobs, replay, self.strategy.anchored, with_entropy, section.head_chunk
            )
            own = torch.tensor([fresh or i.trajectory.policy_version == self.policy_version for i in chunk])
            by_token = own[replay.item].to(self.device) if chunk else True
            term = (entropies, entropy_weights) if entropies is not None else ()
            loss, micro = policy_loss(
                logprobs, terms, denominator, loss_section.clip, kl_beta, by_token, self.variant, *term
            )
            stats.merge([micro])
            total = loss + anchor
            # Without an anchor a micro-batch of which nothing is scored has no graph.
            if total.requires_grad:
                self.strategy.backward(total, last=number == len(batches) - 1)
        return self._reduce(stats)

    def _asks_base(self, items: Sequence[TrainItem]) -> bool:
        """Whether any rank's items are to be compared with the base of the adapters."""
        if not base_is_reference(self.config):
            return False
        asked = [lacks_reference(items)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(asked, asked[0])
        return any(asked)

    def _with_base_reference(self, items: Sequence[TrainItem]) -> list[TrainItem]:
        replay = lay_out(items, self.policy.templates, reference_options(self.config))
        with torch.no_grad():
            logprobs = self.strategy.forward(base_logprobs, replay, self.config.learner.head_chunk)
        return with_reference(items, replay, logprobs)

    def _micro_batches(self, items: Sequence[TrainItem]) -> list[list[int]]:
        """Indices into the items of each micro-batch; as many on every rank, some empty where another rank has more."""
        section = self.config.learner
        sizes = [num_tokens(item, self.policy.templates, self.options) for item in items]
        batches = micro_batches(sizes, section.micro_batch, section.token_budget)
        if self.world_size == 1:
            return batches
        counts = [len(batches)] * self.world_size
        dist.all_gather_object(counts, len(batches))
        return micro_batches(sizes, section.micro_batch, section.token_budget, least=max(counts))

    def _reduce(self, stats: Stats) -> Stats:
        if self.world_size == 1:
            return stats
        everyone: list[Stats] = [stats] * self.world_size
        dist.all_gather_object(everyone, stats)
        return Stats().merge(everyone)

    def _refuse(self, metrics: dict[str, float], norm: float) -> None:
        loss, gap = metrics.get("loss/total", 0.0), metrics.get("mismatch/max_abs", 0.0)
        bound = self.config.loss.max_mismatch
        reason = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss} or gradient norm {norm} is not finite"
        elif not gap <= bound:
            reason = f"sampler and learner log-probs differ by {gap:.3g}, more than loss.max_mismatch={bound}"
        if reason:
            self.strategy.discard()
            raise LearnerError(f"optimiser step on policy version {self.policy_version} refused: {reason}")

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Trained weights by checkpoint name, whole, adapters merged, on the CPU; empty on ranks other than 0."""
        full = {}
        for name, tensor in self.whole_weights():
            if self.rank == 0:
                full[name] = tensor.to("cpu", dtype or tensor.dtype, copy=True)
        return full

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Trained weights by checkpoint name, adapters merged, one whole tensor at a time; all ranks iterate together.

        They may be the live ones: whoever keeps one has to copy it.
        """
        if self.config.policy.lora.rank:
            yield from merged_weights(self.policy, self.strategy.whole)
            return
        for name, parameter in self.parameters.items():
            yield name, self.strategy.whole(parameter)

    def weight_names(self) -> list[str]:
        """The names that `weights` gives on rank 0."""
        if self.config.policy.lora.rank:
            return adapted_names(self.policy)
        return list(self.parameters)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, as `Strategy.state_dict` describes it."""
        return self.strategy.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the tensors of `state_dict` after a checkpoint was read into them."""
        self.strategy.load_state_dict(state)


def _anchored_logprobs(
    policy: JanusPolicy, replay: Replay, anchored: bool, entropy: bool = False, head_chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probs of a replay, entropies if asked, and a zero in whose graph every trained parameter takes part.

    Under sharding all ranks must run the same forwards and reduce the same gradients in the same order: a rank
    without a token to score sends a single one through, and parameters that it does not use get gradient zero.
    """
    anchor = torch.zeros((), device=policy.device)
    if anchored:
        # First in the forward is last in the backward: whatever else uses a parameter outside of the layers, its
        # gradient is complete only here, so that it is reduced after the layers' and in one order on all ranks.
        layers = {id(p) for layer in policy.part("language_model").layers for p in layer.parameters()}
        for parameter in policy.parameters():
            if parameter.requires_grad and id(parameter) not in layers:
                anchor = anchor + 0.0 * parameter.flatten()[0].float()
    logprobs, entropies = replay_logprobs(policy, replay, entropy, head_chunk=head_chunk)
    if anchored and not len(replay):
        bos = torch.tensor([[policy.templates.bos]], device=logprobs.device)
        anchor = anchor + 0.0 * policy.hidden(policy.embed_text(bos), torch.zeros_like(bos)).float().sum()
    return logprobs, entropies, anchor
