"""The learner: replay, loss and AdamW on one process, or on several under FSDP2 with the same result.

The caller starts the process group (gloo on CPU, nccl on GPU) before it builds a learner with `world_size`
above 1, and every rank calls every method at the same time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlpipe.learn.layout import Replay, ReplayOptions, lay_out
from rlpipe.learn.loss import Variant, policy_loss, token_terms
from rlpipe.learn.replay import replay_logprobs
from rlpipe.learn.schedule import learning_rate
from rlpipe.learn.stats import Stats
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import adapted_names, add_adapters, merged_weights
from rlpipe.schema import Config
from rlpipe.types import TrainItem

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LearnerError(RuntimeError):
    """A step that was refused before it touched a weight."""


class FsdpLearner:
    """Trains a policy, or adapters of it, on `TrainItem`s; float32 master weights whatever the compute type.

    learner = FsdpLearner(config)
    metrics = learner.step(items, denominator=len(items), step=0, total_steps=100)
    learner.policy_version    # 1
    tensors = learner.weights()    # by checkpoint name
    """

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1, device: str | None = None) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        wants_gpu = config.learner.num_gpus > 0 and torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if wants_gpu else "cpu"))
        if config.policy.dtype not in _DTYPES:
            raise ValueError(f"policy.dtype: {config.policy.dtype!r} is none of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[config.policy.dtype]
        self.options = ReplayOptions.from_config(config.loss)
        self.variant = Variant.from_config(config.loss)
        self.policy = self._load_policy()
        if config.learner.activation_checkpointing:
            language_model = self.policy.part("language_model")
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
            language_model.train()
        if world_size > 1:
            self._shard()
        self.parameters = {
            name.removeprefix("janus."): parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = self._build_optimizer()
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

    def _shard(self) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        mixed = self.dtype != torch.float32
        precision = MixedPrecisionPolicy(self.dtype, torch.float32) if mixed else MixedPrecisionPolicy()
        # The VQ tokenizer takes no part in a training step.
        ignored = set(self.policy.part("vqmodel").parameters())
        for layer in self.policy.part("language_model").layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(self.policy, mesh=mesh, mp_policy=precision, ignored_params=ignored)

    def _build_optimizer(self) -> torch.optim.AdamW:
        section = self.config.learner
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": section.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=tuple(section.betas), eps=section.eps, fused=True)
        for parameter in self.parameters.values():
            # What AdamW itself makes at its first step; made here so that a checkpoint can be loaded into it.
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

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
        self.optimizer.zero_grad(set_to_none=True)
        stats = self._accumulate(items, denominator, fresh, kl_scale * self.config.loss.kl_beta, entropy_weights)
        for parameter in self.parameters.values():
            # A part that this batch did not use has gradient zero on one rank as on many.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = get_total_norm([p.grad for p in self.parameters.values()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics = stats.values()
        self._refuse(metrics, norm.item())
        clip_grads_with_norm_(self.parameters.values(), self.config.learner.clip_norm, norm)
        rate = lr_scale * learning_rate(self.config.learner, step, total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
        # Items of similar length together: fewer passes, less padding. The loss is a sum over items.
        items = sorted(items, key=lambda item: -len(item.trajectory.segments))
        chunks = [items[i : i + section.micro_batch] for i in range(0, len(items), section.micro_batch)]
        replays = [lay_out(chunk, self.policy.templates, self.options) for chunk in chunks]
        stats, with_entropy = Stats(), entropy_weights is not None
        for number, num_passes in enumerate(self._agree([len(replay.passes) for replay in replays])):
            chunk = chunks[number] if number < len(chunks) else []
            replay = replays[number] if number < len(chunks) else lay_out([], self.policy.templates, self.options)
            terms = token_terms(chunk, replay, loss_section.verdict_ce_share).to(self.device)
            with self._precision():
                logprobs, entropies, anchor = self.policy(
                    _anchored_logprobs, replay, num_passes, self.world_size > 1, with_entropy
                )
            own = torch.tensor([fresh or i.trajectory.policy_version == self.policy_version for i in chunk])
            by_token = own[replay.item].to(self.device) if chunk else True
            term = (entropies, entropy_weights) if entropies is not None else ()
            loss, micro = policy_loss(
                logprobs, terms, denominator, loss_section.clip, kl_beta, by_token, self.variant, *term
            )
            stats.merge([micro])
            # FSDP2 averages gradients over ranks; the denominator is global, so their sum is wanted.
            ((loss + anchor) * self.world_size).backward()
        return self._reduce(stats)

    def _agree(self, num_passes: list[int]) -> list[int]:
        """Passes of each micro-batch on the rank that has most; every rank must run as many."""
        if self.world_size == 1:
            return num_passes
        everyone: list[list[int]] = [[]] * self.world_size
        dist.all_gather_object(everyone, num_passes)
        longest = max(len(counts) for counts in everyone)
        padded = [counts + [1] * (longest - len(counts)) for counts in everyone]
        return [max(1, *counts) for counts in zip(*padded, strict=True)]

    def _reduce(self, stats: Stats) -> Stats:
        if self.world_size == 1:
            return stats
        everyone: list[Stats] = [stats] * self.world_size
        dist.all_gather_object(everyone, stats)
        return Stats().merge(everyone)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute type of a single process; FSDP2 casts by its own policy."""
        mixed = self.dtype != torch.float32 and self.world_size == 1
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            yield

    def _refuse(self, metrics: dict[str, float], norm: float) -> None:
        loss, gap = metrics.get("loss/total", 0.0), metrics.get("mismatch/max_abs", 0.0)
        bound = self.config.loss.max_mismatch
        reason = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss} or gradient norm {norm} is not finite"
        elif not gap <= bound:
            reason = f"sampler and learner log-probs differ by {gap:.3g}, more than loss.max_mismatch={bound}"
        if reason:
            self.optimizer.zero_grad(set_to_none=True)
            raise LearnerError(f"optimiser step on policy version {self.policy_version} refused: {reason}")

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Trained weights by checkpoint name, whole, adapters merged, on the CPU; empty on ranks other than 0."""
        full = {}
        for name, tensor in self._whole_weights():
            if self.rank == 0:
                full[name] = tensor.to("cpu", dtype or tensor.dtype, copy=True)
        return full

    def _whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.config.policy.lora.rank:
            yield from merged_weights(self.policy)
            return
        for name, parameter in self.parameters.items():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def weight_names(self) -> list[str]:
        """The names that `weights` gives on rank 0."""
        if self.config.policy.lora.rank:
            return adapted_names(self.policy)
        return list(self.parameters)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors, sharded as they are, under `model.<name>` and `optimizer.<key>.<name>`."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state.update({f"optimizer.{k}.{name}": v for k, v in self.optimizer.state[parameter].items()})
        return state


def _anchored_logprobs(
    policy: JanusPolicy, replay: Replay, num_passes: int, anchored: bool, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probs of a replay, entropies if asked, and a zero in whose graph every trained parameter takes part.

    Under FSDP2 all ranks must run the same forwards and reduce the same gradients: passes that this rank
    lacks are made up with a single token, and parameters that it does not use get gradient zero.
    """
    logprobs, entropies = replay_logprobs(policy, replay, entropy)
    anchor = logprobs.new_zeros(())
    if not anchored:
        return logprobs, entropies, anchor
    bos = torch.tensor([[policy.templates.bos]], device=logprobs.device)
    for _ in range(num_passes - len(replay.passes)):
        anchor = anchor + 0.0 * policy.hidden(policy.embed_text(bos), torch.zeros_like(bos)).float().sum()
    layers = {id(p) for layer in policy.part("language_model").layers for p in layer.parameters()}
    for parameter in policy.parameters():
        if parameter.requires_grad and id(parameter) not in layers:
            anchor = anchor + 0.0 * parameter.flatten()[0].float()
    return logprobs, entropies, anchor
