"""The configuration's sections of jobs beside reinforcement: supervised data, evaluation, scoring, generation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SftSection:
    draw: float = 0.4
    judge: float = 0.4
    redraw: float = 0.2
    edit: float = 0.0
    """Mixing ratio of the sub-tasks; one task is drawn per step, the same on every rank; 0 leaves a task out."""
    batch_size: int = 64
    prompt_dropout: float = 0.1
    """Share of drawings, redrawings and edits whose prompt is blanked, so that guidance has an unconditional model."""
    data: str = ""
    """Folder with labels/<source>_<threshold>.jsonl (official layout, `launch/build_data.py`), or with rendered.npz,
    drawn.npz and corrections.npy of `launch/build_tiny.py`; empty: the tiny world's generator makes examples."""
    labels: list[str] = field(default_factory=list)
    """Label files to read, in place of every labels/*.jsonl of sft.data."""
    root: str | None = None
    """Folder that img_path is relative to; none: sft.data or the nearest folder above it that has the first image."""
    label_by: str = "state"
    """Which images are right and wrong: by the label's state (official), or by its prob and the bounds below."""
    target_prob: float = 0.8
    positive_prob: float = 0.7
    negative_prob: float = 0.5
    """label_by prob (paper): least score of an image to draw, least of one judged Yes; below the last it is a No."""
    target_sources: list[str] = field(default_factory=list)
    """Sources (file name up to the last "_") whose right images are drawn and redrawn; empty: all (official: flux)."""
    judge_sources: list[str] = field(default_factory=list)
    """Sources whose images are judged; empty: all (official: flux). Wrong images to redraw come from all sources."""
    max_context_images: int = 1
    """Most images before the target, each with its reflection: 1 (official) or up to 3 (paper). Several are wrong
    images of the prompt in the order of their scores, and need rollout.history=all."""
    redraw_roles: str = "chat"
    """Roles in the prompt of a redrawing: chat (as everywhere), or plain ("User", "Assistant"; official)."""
    edits: str = ""
    """JSONL of edits: {"image1": source, "image2": target, "text": instruction}; images relative to its folder."""
    num_samples: int = 20000
    """Examples that the tiny world's generator makes."""
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    threads: int = 2
    """Of the actor that builds batches; with a GPU it encodes label images there."""
    pixel_cache: int = 512
    """Decoded label images that it keeps in memory."""


@dataclass
class FactorySection:
    out: str = "runs/sft_data"
    """Folder of the set: labels/, images/, shards/; what is finished there is not made again."""
    source: str = "janus"
    """Name of the drawn images: images/<source>/, labels/<source>_<positive_prob>.jsonl."""
    images_per_prompt: int = 18
    """Images that the policy draws for every prompt (paper: 18); 0: label only factory.images."""
    images: str = ""
    """Images made elsewhere: a folder of <prompt>_<number>.png, or a JSONL of {"id": prompt, "images": [paths]}."""
    images_source: str = "flux"
    """Name of the images made elsewhere."""
    shard_size: int = 64
    """Prompts of one shard: what is lost when the job is interrupted."""
    limit: int = 0
    """Use only the first so many prompts; 0: all."""
    positive_prob: float = 0.7
    negative_prob: float = 0.7
    """Score from which an image is right, and below which it is wrong (official 0.7, 0.7; paper 0.7, 0.5)."""
    question: str | None = None
    """What the judge is asked for its reason; none: the scorer's own question."""
    reason_tokens: int = 128
    reason_sentences: int = 0
    """Sentences of a reason that are kept; 0: all."""
    max_failed_share: float = 0.25
    """Share of images of a shard without score above which the job stops."""


@dataclass
class ScoreSection:
    """What `launch/score.py` has scored by every scorer of `reward`."""

    images: str = ""
    """A folder of images, a results folder of `launch/generate.py`, or a JSONL of {"image": path, "prompt": text}."""
    caption: str = ""
    """Prompt of the images that have none of their own."""
    prompts: str = ""
    """Prompt file in which rows without a prompt are looked up by their `id`, for text and metadata."""
    which: str = "every"
    """Images of a results folder: every, first, or final (those that samples end with)."""
    world: int = 0
    """Where score.images does not exist: so many prompts of evaluate.prompts are rendered there in the tiny world, and
    shown under their own prompt and under one that they just miss."""
    out: str = "runs/scores"
    """Folder of scores.jsonl; what is finished there is not scored again."""
    shard_size: int = 128
    """Images of one shard: what is lost when the job is interrupted."""
    limit: int = 0
    """Use only the first so many images; 0: all."""
    max_failed_share: float = 0.25
    """Share of one scorer's scores that are missing so far above which the job stops."""
    retry_missing: bool = False
    """Score those finished shards again in which a score is missing."""


@dataclass
class CalibrateSection:
    """How `launch/calibrate_judge.py` holds scores against labels."""

    scores: str = ""
    """A scores.jsonl of `launch/score.py`; empty: score.images are scored first, or found scored in score.out."""
    scorer: str = ""
    """Name of the scorer, or name/part for one of its parts; empty: the first one."""
    labels: str = "rows"
    """What is true: rows (their key `label`), or checker (the tiny world's, by the rows' metadata)."""
    positive_label: float = 0.5
    """Labels that are numbers count as right from here on."""
    threshold: float = 0.5
    """Scores above it say yes."""
    bins: int = 10
    """Of the calibration curve, equally wide."""
    resamples: int = 1000
    """Bootstrap samples of the 95 % intervals; prompts are drawn, with all their images."""
    out: str = ""
    """Folder of calibration.json and calibration.svg; empty: that of the scores."""


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
class GenerateSection:
    """What `launch/generate.py` makes; how it draws is in `rollout`."""

    caption: str = ""
    """The one prompt; empty: those of data.prompts."""
    images: str = ""
    """Look at given images alone, or edit them (rollout.program=edit): one image or a folder of them with the caption,
    or prompts with a source_image each."""
    samples: int = 4
    """Samples of each prompt (official --parallel_size)."""
    verdict_threshold: float | None = None
    """Say Yes exactly where P(Yes) is above it; null: the verdict is sampled."""
    batch_size: int = 16
    """Samples that a worker draws at once."""
    dir: str = "results"
    """Folder of the images and their records."""
