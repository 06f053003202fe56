"""The configuration schema: one dataclass per section, the only place where a key or a default is defined.

`rlpipe.config` merges a YAML file and `key=value` overrides over these dataclasses and checks the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunSection:
    dir: str = "runs/tiny_grpo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, rollouts/, report/, summary.json."""


@dataclass
class PolicySection:
    path: str = "rlpipe/world/assets/policy"
    """Folder of a JanusForConditionalGeneration checkpoint with its tokenizer.json."""
    dtype: str = "float32"
    """Compute type of sampler, reference and learner: float32 or bfloat16 (the masters stay float32)."""
    trainable: list[str] = field(
        default_factory=lambda: [
            "language_model",
            "aligner",
            "generation_embeddings",
            "generation_aligner",
            "generation_head",
            "lm_head",
        ]
    )
    """Parts that receive gradients (official set); the vision tower and the VQ tokenizer stay frozen."""


@dataclass
class DataSection:
    prompts: str = "rlpipe/world/assets/prompts_train.jsonl"
    """Training prompts: .txt (one a line), .jsonl, .parquet, or a folder saved by `datasets`."""
    shuffle: bool = True


@dataclass
class RolloutSection:
    workers: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 2
    """Torch threads of one worker on CPU."""
    groups_per_call: int = 8
    """Prompts that a worker draws in one batch (each times train.group_size)."""
    guidance: float = 1.0
    """Classifier-free guidance scale; rollouts, learner and evaluation use this one value."""
    image_temperature: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    text_temperature: float = 1.0
    text_top_k: int = 0
    text_top_p: float = 1.0
    max_reflection_tokens: int = 24
    max_images: int = 2
    redraw: str = "on_no"
    """on_no: a second image only after "No". always: for every trajectory (credit v3 needs it)."""
    redraw_context: str = "sampled"
    """The first image while the second is drawn: its sampled codes, or its pixels reencoded (official)."""
    timeout_s: float = 600.0


@dataclass
class ScorerSection:
    name: str = "judge"
    """Key of the metrics reward/<name>/*."""
    scorer: str = "internvl"
    """Registry name or import path `package.module:Class`."""
    path: str | None = "rlpipe/world/assets/judge"
    """Checkpoint folder handed to the scorer, where it needs one."""
    weight: float = 1.0
    question: str = 'Does this image match the description "{prompt}"? Please directly respond with yes or no.'
    replicas: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 2
    batch_size: int = 128
    timeout_s: float = 120.0
    retries: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the scorer's constructor."""


@dataclass
class CreditSection:
    rule: str = "v1"
    """Which scores credit which segment: v1 (official default), v2, v3."""
    std_eps: float = 1e-4
    """Added to the group's standard deviation (official 1e-4)."""
    first_weight: float = 1.0
    reflection_weight: float = 1.0
    final_weight: float = 1.0
    """Weights of the three spans' terms; the official total is their plain mean."""
    balance_verdicts: bool = False
    """Weigh reflections so that images that match and images that do not count alike in a step. As right images become
    the majority, calling everything right pays ever more; this keeps the verdict honest about the rest."""
    max_failed_share: float = 0.25
    """Share of missing scores in one step above which the run stops with a checkpoint."""


@dataclass
class LossSection:
    logits: str = "guided"
    """guided: the distribution that was sampled. scaled: guided logits / guidance (official). conditional: no
    guidance."""
    clip: float = 0.2
    kl_beta: float = 0.04
    verdict: str = "restricted"
    """First reflection token: scored over {Yes, No} as it was sampled (restricted), or over the vocabulary
    (full, official)."""
    train_eos: bool = True
    """Whether the reflection's end-of-sentence token is in the loss (official: no)."""
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
    """constant, linear, cosine (all after a linear warm-up), or linear_then_linear / linear_then_cosine
    (official, paper) through convert_lr at convert_steps."""
    convert_steps: int = 0
    convert_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    micro_batch: int = 64
    """Trajectories in one forward and backward pass of one rank."""
    activation_checkpointing: bool = False
    timeout_s: float = 1800.0


@dataclass
class TrainSection:
    steps: int = 120
    prompts_per_step: int = 16
    group_size: int = 8
    checkpoint_every: int = 20
    keep_checkpoints: int = 2


@dataclass
class SftSection:
    draw: float = 0.4
    judge: float = 0.4
    redraw: float = 0.2
    """Mixing ratio of the three sub-tasks; one task is drawn per step, the same on every rank."""
    batch_size: int = 64
    prompt_dropout: float = 0.1
    """Share of drawings whose prompt is blanked, so that guidance has an unconditional model."""
    data: str = ""
    """Folder with rendered.npz, drawn.npz and corrections.npy as `launch/build_tiny.py` leaves them; empty: the tiny
    world's generator makes examples."""
    num_samples: int = 20000
    """Examples that the tiny world's generator makes."""


@dataclass
class EvaluateSection:
    prompts: str = "rlpipe/world/assets/prompts_test.jsonl"
    limit: int = 0
    """Use only the first so many rows; 0: all."""
    batch_size: int = 200
    guidance_sweep: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Guidance scales at which the SFT policy is measured besides rollout.guidance, to find its own best."""
    seed: int = 20_000


@dataclass
class ObserveSection:
    terminal: str = "auto"
    """auto: live view on a terminal, plain lines otherwise; plain; off."""
    wandb: bool = False
    tensorboard: bool = False
    gallery_every: int = 10
    """Steps between saved rollout samples (images and records in rollouts/, shown in report/index.html)."""
    gallery_size: int = 8


@dataclass
class PlacementSection:
    ray_address: str | None = None
    """None: join the cluster of RAY_ADDRESS if set (as under `ray job submit`), else start a local one."""
    local_cpus: int | None = None
    """CPUs of a local cluster; None: those of the machine."""


@dataclass
class Config:
    seed: int = 0
    resume: str = "auto"
    """auto: continue from the latest checkpoint of run.dir if there is one. never: refuse a used run.dir.
    Otherwise the path of a checkpoint."""
    max_staleness: int = 0
    """How many policy versions old a trajectory may be when it is trained on; 0 is synchronous training."""
    run: RunSection = field(default_factory=RunSection)
    policy: PolicySection = field(default_factory=PolicySection)
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    reward: list[ScorerSection] = field(default_factory=lambda: [ScorerSection()])
    credit: CreditSection = field(default_factory=CreditSection)
    loss: LossSection = field(default_factory=LossSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    learner: LearnerSection = field(default_factory=LearnerSection)
    train: TrainSection = field(default_factory=TrainSection)
    sft: SftSection = field(default_factory=SftSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    observe: ObserveSection = field(default_factory=ObserveSection)
    placement: PlacementSection = field(default_factory=PlacementSection)
