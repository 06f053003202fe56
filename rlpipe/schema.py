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
from rlpipe.schema_learn import (
    CreditSection,
    DeclineSection,
    LearnerSection,
    LossSection,
    ReferenceSection,
    SyncSection,
    TrainSection,
)

PARTS = (
    "language_model",
    "aligner",
    "generation_embeddings",
    "generation_aligner",
    "generation_head",
    "lm_head",
)
"""Parts of a policy that can be trained, by their checkpoint names."""


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
    path: str | None = None
    """Folder with adapters in peft's format to start from, of the same rank, alpha and targets; null: new ones."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the parts in policy.trainable that get an adapter, by the last pieces of their names."""


@dataclass
class PolicySection:
    path: str = "rlpipe/world/assets/policy"
    """Folder of a Janus checkpoint, in the original layout or in transformers', with its tokenizer.json."""
    overlay: str | None = None
    """File with a state dict (.pth, .safetensors) whose tensors replace those of `path`."""
    dtype: str = "float32"
    """Compute type of sampler, reference and learner: float32 or bfloat16 (the masters stay float32)."""
    trainable: list[str] = field(default_factory=lambda: list(PARTS))
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
    """Prompts that a worker is given in one call (each times train.group_size)."""
    rows: str = "auto"
    """Trajectories that a worker draws at once, while the others of its call wait: auto, as many as fit into the memory
    that is free when it starts, or a number."""
    cache_dtype: str = "auto"
    """Keys and values of a worker: auto, in policy.dtype, or float8_e4m3, in half of bfloat16's memory (GPUs alone)."""
    branches: int = 1
    """Trajectories that go on, each with a reflection and a redraw of its own, from one shared first image."""
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
    sync: SyncSection = field(default_factory=SyncSection)
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
