"""The configuration schema: one dataclass per section, the only place where a key or a default is defined.

`rlpipe.config` merges a YAML file and `key=value` overrides over these dataclasses and checks the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlpipe.schema_jobs import (
    CalibrateSection,
    EvaluateSection,
    FactorySection,
    GenerateSection,
    ScoreSection,
    SftSection,
)


@dataclass
class RunSection:
    dir: str = "runs/tiny_grpo"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, rollouts/, report/, summary.json."""


@dataclass
class TemplateSection:
    """The fixed strings around captions, images and reflections; the defaults are the official ones."""

    prompt: str = "<|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>"
    """What an image is drawn for; begin-of-sentence goes before it."""
    look: str = "<end_of_image>\nLet me think Does this image match the prompt..."
    """What follows an image that is looked at."""
    redraw: str = "<｜end▁of▁sentence｜>\nNext, I will draw a new image<begin_of_image>"
    """What follows a reflection before the next image."""
    edit: str = (
        "<|User|>: <begin_of_image>{source}<end_of_image>{instruction} Please generate an image."
        "\n\n<|Assistant|>:<begin_of_image>"
    )
    """What an edited image is drawn for; begin-of-sentence goes before it."""


@dataclass
class LoraSection:
    rank: int = 0
    """Rank of the low-rank adapters that are trained in place of the parts in policy.trainable; 0: none."""
    alpha: float = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of an adapter's input; supervised fine-tuning only."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the parts in policy.trainable that get an adapter, by the last piece of their names."""


@dataclass
class PolicySection:
    path: str = "rlpipe/world/assets/policy"
    """Folder of a Janus checkpoint, in the original layout or in transformers', with its tokenizer.json."""
    overlay: str | None = None
    """File with a state dict (.pth, .safetensors) whose tensors replace those of `path`."""
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
    lora: LoraSection = field(default_factory=LoraSection)
    max_prompt_tokens: int = 200
    """Most tokens of a prompt with its frame (official 200; the source image of an edit not counted)."""
    templates: TemplateSection = field(default_factory=TemplateSection)


@dataclass
class DataSection:
    prompts: str = "rlpipe/world/assets/prompts_train.jsonl"
    """Training prompts: .txt (one a line), .jsonl, .parquet, or a folder saved by `datasets`."""
    shuffle: bool = True
    long_prompts: str = "refuse"
    """Prompts over policy.max_prompt_tokens: refuse to start, or cut the end of the caption."""


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
    program: str = "introspect"
    """introspect: draw, look, draw again. draw: one image, no reflection. edit: the prompt is an instruction, its
    source_image is what it edits."""
    redraw: str = "on_no"
    """on_no: another image only after "No". always: whatever the verdict (credit v3 needs it)."""
    redraw_context: str = "sampled"
    """An earlier image while the next is drawn: its sampled codes, or its pixels reencoded (official)."""
    history: str = "last"
    """What reflection and redraw look back at from the third image on: the last image, or all of them (paper)."""
    reflection_room: str = "fixed"
    """Positions of a reflection while the next image is drawn. fixed: max_reflection_tokens. exact: its tokens.
    group: those of the longest reflection of its prompt's group (official)."""
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
    """In the sum that an image's reward is; 0 logs the score alone."""
    rewards: list[str] = field(default_factory=lambda: ["generation", "comprehension"])
    """What the score enters: generation (the reward of an image), comprehension (what verdicts are held against: the
    weighted mean of these scorers, whose scores must be probabilities)."""
    sees: list[str] = field(default_factory=lambda: ["every_image"])
    """Images that it scores: every_image, first_image or final_image. Also shown to it: verdict (what the policy said
    of the image), source_image (what an edit starts from)."""
    canary: bool = False
    """A judge that is never trained on (weight 0), logged beside the reward, so that reward hacking shows."""
    question: str = 'Does this image match the description "{prompt}"? Please directly respond with yes or no.'
    replicas: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 2
    batch_size: int = 128
    """Most requests in one call of the scorer."""
    concurrency: int = 1
    """Calls that one replica's scorer answers at once; above 1 for scorers that wait for somebody else (HTTP)."""
    timeout_s: float = 120.0
    """Of one call of the scorer."""
    retries: int = 2
    """Times that what is missing is asked for again."""
    backoff_s: float = 0.5
    """Pause before the first retry; doubled before each further one."""
    cache: int = 4096
    """Scores that a replica remembers, so that an equal request is not computed again; 0: none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the scorer's constructor."""


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
    decline: DeclineSection = field(default_factory=DeclineSection)
    sft: SftSection = field(default_factory=SftSection)
    factory: FactorySection = field(default_factory=FactorySection)
    score: ScoreSection = field(default_factory=ScoreSection)
    calibrate: CalibrateSection = field(default_factory=CalibrateSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    observe: ObserveSection = field(default_factory=ObserveSection)
    placement: PlacementSection = field(default_factory=PlacementSection)
