"""The configuration's sections of learning: credit, loss, reference, learner, the training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class CreditSection:
    rule: str = "v1"
    """Which scores credit which segment: v1 (official default), v2, v3; summed (paper: one advantage for the whole
    trajectory); segments (every image and reflection by its own score); single (draw and edit: one image)."""
    std: str = "sample"
    """Standard deviation of a group: sample (n - 1, official), population (n), none (advantage is reward - mean)."""
    std_eps: float = 1e-4
    """Added to the group's standard deviation (official 1e-4)."""
    baseline: str = "mean"
    """What a reward is compared with: the group's mean (official), or leave_one_out, the mean of the others (RLOO)."""
    weighting: str = "rule"
    """Mean that the loss is: that of credit.rule, or over spans (segment), trajectories (sequence), all tokens of the
    batch (token, DAPO), or token sums over a constant length (constant, Dr. GRPO). See docs/algorithms.md."""
    redraws: int = 0
    """Groups whose rewards are all equal are replaced by those of further prompts (dynamic sampling, DAPO): at most so
    many for each of train.prompts_per_step; what is equal after that is kept."""
    redraw_spread: float = 1e-6
    """Rewards of a group that differ by no more count as equal."""
    first_weight: float = 1.0
    reflection_weight: float = 1.0
    final_weight: float = 1.0
    """Weights of the terms of first image, reflections and final image (`segments`: any later image); the official
    total is their plain mean. `summed` and `single` have one term."""
    balance_verdicts: bool = False
    """Weigh reflections so that images that match and images that do not count alike in a step. As right images become
    the majority, calling everything right pays ever more; this keeps the verdict honest about the rest."""
    max_failed_share: float = 0.25
    """Share of missing scores, of one scorer's last `failed_window`, above which the run stops with a checkpoint."""
    failed_window: int = 1000


@dataclass
class EntropySection:
    mode: str = "none"
    """none; bonus: `weight` times the entropy is subtracted from the loss; adaptive: each kind's weight is moved, up or
    down, so that its entropy comes to its target (ReasonGen-R1)."""
    weight: float = 0.0
    image_target: float | None = None
    text_target: float | None = None
    """Of adaptive: nats per token (ReasonGen-R1: image 7.0, text 2.0); null leaves a kind alone."""
    weight_lr: float = 5e-5
    max_weight: float = 5e-3
    """Of adaptive: how fast a weight moves, and the largest it may be."""


@dataclass
class LossSection:
    logits: str = "guided"
    """guided: the distribution that was sampled. scaled: guided logits / guidance (official). conditional: no
    guidance."""
    clip: float | None = 0.2
    """Range around 1 of the ratio to the sampler; null: no clipping (official editing)."""
    clip_high: float | None = None
    """The same above 1, where it is another than below (DAPO: 0.28 with clip 0.2)."""
    ratio: str = "token"
    """What has a ratio to the sampler of its own: a token, a segment or a whole trajectory (sequence); the last two are
    geometric means over tokens (GSPO, there with clip 3e-4 and clip_high 4e-4)."""
    correction: str = "clipped"
    """What is done about samples of older weights: the ratio is clipped (PPO); or it is a mere weight of the gradient,
    truncated at correction_cap, or masked, 0 outside 1 / correction_cap to correction_cap (both with the present policy
    as the proximal one); none: nothing."""
    correction_cap: float = 2.0
    kl: str = "k3"
    """Estimate of the KL to the reference: k1, k2, k3 (official)."""
    kl_beta: float = 0.04
    entropy: EntropySection = field(default_factory=EntropySection)
    verdict: str = "restricted"
    """First reflection token: scored over {Yes, No} as it was sampled (restricted), or over the vocabulary
    (full, official)."""
    train_eos: bool = True
    """Whether the reflection's end-of-sentence token is in the loss (official: no)."""
    context: str = "live"
    """Embeddings of what a scored segment looks back at: live (they receive gradients) or constant (official)."""
    verdict_ce_share: float = 0.8
    """Supervised reflections: weight of the verdict token; the mean of the other tokens has the rest."""
    max_mismatch: float = 1.0
    """The run stops when the log-prob of any sampled token differs more than this between sampler and learner
    (of the same policy version)."""


@dataclass
class ReferenceSection:
    replicas: int = 1
    path: str | None = None
    """Checkpoint of the reference policy; none: the policy's own."""
    context: str = "own"
    """Embeddings of what a scored segment looks back at: the reference's own, or the policy's (official)."""
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 2
    timeout_s: float = 600.0


@dataclass
class LearnerSection:
    ranks: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 2
    lr: float = 2e-4
    min_lr: float = 2e-5
    warmup_steps: int = 10
    schedule: str = "cosine"
    """After a linear warm-up: constant, linear, cosine, or linear_then_linear / linear_then_cosine (official, paper)
    through convert_lr at convert_steps, whose step 0 has rate 0."""
    convert_steps: int = 0
    convert_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    micro_batch: int = 64
    """Trajectories in one forward and backward pass of one rank."""
    token_budget: int | None = None
    """Most tokens of one forward and backward pass, in place of micro_batch; a longer trajectory goes alone."""
    head_chunk: int = 1024
    """Tokens whose logits exist at once; the backward pass makes them again, chunk by chunk."""
    strategy: str = "fsdp2"
    """What shards weights, gradients and moments over the ranks: fsdp2, or deepspeed (its extra must be installed)."""
    zero_stage: int = 2
    """Of deepspeed: 1 shards the moments, 2 also the gradients, 3 also the weights."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration file, merged over those that the learner makes."""
    replicas: int = 1
    """Of fsdp2: weights are sharded over ranks / replicas ranks, and as many times there; 1: over all ranks."""
    activation_checkpointing: str = "none"
    """Computed again in the backward pass of a layer: none; selective (all but matrix products and attention);
    full (everything). false and true are none and full."""
    compile: bool = False
    """Compile the norms and MLPs of the language model."""
    offload: str = "none"
    """Kept on the host between steps: none, optimizer (moments), parameters (also weights and gradients)."""
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        switch = {"true": "full", "false": "none"}
        self.activation_checkpointing = switch.get(
            str(self.activation_checkpointing).lower(), self.activation_checkpointing
        )


@dataclass
class SyncSection:
    """The way of new weights to the rollout workers; see docs/weight_sync.md."""

    transport: str = "object_store"
    """object_store: Ray's. gloo, nccl: a collective group of the learner and the workers, made anew when one is lost;
    nccl needs a whole GPU for each, and is untested."""
    bucket_mib: int = 128
    """Size of the pieces that weights travel in: one is sent while the next is gathered."""


@dataclass
class TrainSection:
    steps: int = 120
    prompts_per_step: int = 16
    group_size: int = 8
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    """The newest so many stay."""
    keep_every: int = 0
    """So do those of every such step, for ever; a multiple of checkpoint_every, 0: none."""
    checkpoint_async: str = "auto"
    """Training goes on while a checkpoint is written, from a copy in the host's memory: always, never, or auto, where
    the free memory holds the copy."""
    export_every: int = 0
    """Steps between whole policies in exports/ of the run folder (transformers layout), for others to use; a multiple
    of checkpoint_every, 0: none."""


@dataclass
class DeclineSection:
    """Reaction to a declining reward curve; the rule is that of `rlpipe/learn/decline.py`."""

    action: str = "none"
    """none, or react: a sharp fall of the mean trajectory reward lowers the learning rate, a slow decline lowers the
    KL weight while the reference is young, else makes the present policy the reference (paper, by hand there)."""
    window: int = 10
    """Steps that a point of the curve is the mean of."""
    sharp_fall: float = 0.15
    """Fall against the window before, as a share, from which on it is sharp."""
    slow_fall: float = 0.05
    """Fall against the best point, as a share, that counts as a decline after `patience` steps in a row."""
    patience: int = 10
    cooldown: int = 10
    """Steps after a reaction in which nothing is measured."""
    lr_factor: float = 0.5
    """Of the learning rate at a sharp fall (paper: 1/2 or 2/3)."""
    kl_factor: float = 0.5
    """Of the KL weight at a slow decline with a young reference."""
    reference_age: int = 100
    """Steps since the reference was taken from which on it is no longer young."""
