"""What a configuration must satisfy beyond its types: ranges, choices, rules across fields, files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpipe.data.prompts import PromptError, load_prompts
from rlpipe.paths import resolve_path
from rlpipe.schema import Config

CHOICES = {
    "policy.dtype": ("float32", "bfloat16"),
    "rollout.redraw": ("on_no", "always"),
    "rollout.redraw_context": ("sampled", "reencoded"),
    "rollout.max_images": (1, 2),
    "credit.rule": ("v1", "v2", "v3"),
    "loss.logits": ("guided", "scaled", "conditional"),
    "loss.verdict": ("restricted", "full"),
    "learner.schedule": ("constant", "linear", "cosine", "linear_then_linear", "linear_then_cosine"),
    "observe.terminal": ("auto", "plain", "off"),
}
AT_LEAST = {
    "seed": 0,
    "max_staleness": 0,
    "rollout.workers": 1,
    "rollout.num_cpus": 0,
    "rollout.num_gpus": 0,
    "rollout.threads": 1,
    "rollout.groups_per_call": 1,
    "rollout.image_top_k": 0,
    "rollout.text_top_k": 0,
    "rollout.max_reflection_tokens": 1,
    "reward.*.weight": 0,
    "reward.*.replicas": 1,
    "reward.*.num_cpus": 0,
    "reward.*.num_gpus": 0,
    "reward.*.threads": 1,
    "reward.*.batch_size": 1,
    "reward.*.retries": 0,
    "credit.std_eps": 0,
    "credit.first_weight": 0,
    "credit.reflection_weight": 0,
    "credit.final_weight": 0,
    "loss.kl_beta": 0,
    "reference.replicas": 1,
    "reference.num_cpus": 0,
    "reference.num_gpus": 0,
    "reference.threads": 1,
    "learner.ranks": 1,
    "learner.num_cpus": 0,
    "learner.num_gpus": 0,
    "learner.threads": 1,
    "learner.min_lr": 0,
    "learner.warmup_steps": 0,
    "learner.convert_steps": 0,
    "learner.convert_lr": 0,
    "learner.weight_decay": 0,
    "learner.micro_batch": 1,
    "train.steps": 1,
    "train.prompts_per_step": 1,
    "train.group_size": 2,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "sft.draw": 0,
    "sft.judge": 0,
    "sft.redraw": 0,
    "sft.batch_size": 1,
    "sft.num_samples": 1,
    "evaluate.limit": 0,
    "evaluate.batch_size": 1,
    "evaluate.seed": 0,
    "observe.gallery_every": 1,
    "observe.gallery_size": 0,
    "placement.local_cpus": 1,
}
ABOVE_ZERO = {
    "rollout.guidance",
    "rollout.image_temperature",
    "rollout.text_temperature",
    "rollout.timeout_s",
    "reward.*.timeout_s",
    "loss.clip",
    "loss.max_mismatch",
    "reference.timeout_s",
    "learner.lr",
    "learner.eps",
    "learner.clip_norm",
    "learner.timeout_s",
}
SHARES = {
    "rollout.image_top_p",
    "rollout.text_top_p",
    "credit.max_failed_share",
    "loss.verdict_ce_share",
    "sft.prompt_dropout",
}
"""Between 0 and 1, both included; a top-p of 0 is refused further down."""
ROLLOUT_DEFINES = (
    "guidance",
    "image_temperature",
    "text_temperature",
    "max_reflection_tokens",
    "max_images",
    "redraw",
    "redraw_context",
)
PARTS = (
    "language_model",
    "aligner",
    "generation_embeddings",
    "generation_aligner",
    "generation_head",
    "lm_head",
)


def problems_of(config: Config, job: str = "grpo") -> list[str]:
    """One line for each thing that is wrong, in the order of the schema: field, value, way out."""
    problems = [line for key, value in _values(config) for line in _range_problems(key, value)]
    problems += _sampling_problems(config)
    problems += _learner_problems(config)
    problems += _reward_problems(config, job)
    problems += _file_problems(config, job)
    return problems


def _values(section: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every field; scorers as `reward.0.weight`."""
    for f in fields(section):
        value, key = getattr(section, f.name), where + f.name
        if is_dataclass(value):
            yield from _values(value, key + ".")
        elif key == "reward":
            for i, scorer in enumerate(value):
                yield from _values(scorer, f"reward.{i}.")
        else:
            yield key, value


def _range_problems(key: str, value: Any) -> Iterator[str]:
    rule = "reward.*." + key.split(".", 2)[2] if key.startswith("reward.") else key
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: {value} is not finite; give a number"
    elif rule in CHOICES and value not in CHOICES[rule]:
        yield f"{key}: {value!r} is none of {', '.join(map(str, CHOICES[rule]))}"
    elif rule in AT_LEAST and value is not None and value < AT_LEAST[rule]:
        yield f"{key}: {value} is too small; give {AT_LEAST[rule]} or more"
    elif rule in ABOVE_ZERO and value <= 0:
        yield f"{key}: {value} is not positive; give a number above 0"
    elif rule in SHARES and not 0 <= value <= 1:
        yield f"{key}: {value} is no share; give a number from 0 to 1"
    elif rule.endswith("_top_p") and value == 0:
        yield f"{key}: 0 keeps no token; give 1.0 to switch truncation off, or a share above 0"


def _sampling_problems(config: Config) -> Iterator[str]:
    rollout, loss = config.rollout, config.loss
    if config.credit.rule == "v3" and rollout.redraw != "always":
        yield f"rollout.redraw: {rollout.redraw!r} has no second image for credit.rule v3; set it to always"
    if rollout.redraw == "always" and config.credit.rule != "v3":
        yield (
            f"rollout.redraw: 'always' draws images that credit.rule {config.credit.rule} does not credit; "
            "set credit.rule=v3 or rollout.redraw=on_no"
        )
    if rollout.redraw == "always" and rollout.max_images < 2:
        yield f"rollout.max_images: {rollout.max_images} is too few for rollout.redraw always; set it to 2"
    if loss.logits != "guided" and config.max_staleness > 0 and rollout.guidance != 1.0:
        yield (
            f"loss.logits: {loss.logits!r} is not the distribution that was sampled at rollout.guidance "
            f"{rollout.guidance:g}, so samples of max_staleness {config.max_staleness} cannot be corrected; "
            "set loss.logits=guided, max_staleness=0 or rollout.guidance=1"
        )
    if loss.verdict == "full" and config.max_staleness > 0:
        yield (
            f"loss.verdict: 'full' is not the distribution that was sampled, so samples of max_staleness "
            f"{config.max_staleness} cannot be corrected; set loss.verdict=restricted or max_staleness=0"
        )
    if config.credit.rule == "v2" and rollout.redraw_context == "reencoded":
        yield "rollout.redraw_context: 'reencoded' gives credit.rule v2 no context after a Yes; set it to sampled"
    for key, top_k in (("image", rollout.image_top_k), ("text", rollout.text_top_k)):
        if top_k == 1:
            yield f"rollout.{key}_top_k: 1 always takes the likeliest token, which teaches nothing; give 0 or above 1"
    for scale in config.evaluate.guidance_sweep:
        if not (math.isfinite(scale) and scale > 0):
            yield f"evaluate.guidance_sweep: {scale} is no guidance scale; give numbers above 0"


def _learner_problems(config: Config) -> Iterator[str]:
    learner, train, sft = config.learner, config.train, config.sft
    trajectories = train.prompts_per_step * train.group_size
    if learner.ranks > trajectories:
        yield (
            f"learner.ranks: {learner.ranks} ranks share {trajectories} trajectories a step; "
            "give fewer ranks or more train.prompts_per_step"
        )
    if learner.min_lr > learner.lr:
        yield f"learner.min_lr: {learner.min_lr:g} is above learner.lr {learner.lr:g}; give a smaller one"
    if learner.schedule.startswith("linear_then_"):
        if not learner.warmup_steps <= learner.convert_steps < train.steps:
            yield (
                f"learner.convert_steps: {learner.convert_steps} is not between learner.warmup_steps "
                f"{learner.warmup_steps} and train.steps {train.steps}, for {learner.schedule}"
            )
        if learner.convert_lr <= 0:
            yield f"learner.convert_lr: {learner.convert_lr:g}; {learner.schedule} needs a rate above 0"
    if len(learner.betas) != 2 or not all(0 <= beta < 1 for beta in learner.betas):
        yield f"learner.betas: {learner.betas}; give two numbers in [0, 1) such as [0.9, 0.95]"
    if sft.draw + sft.judge + sft.redraw <= 0:
        yield f"sft.draw: {sft.draw:g}, with sft.judge and sft.redraw, sums to 0; give one a share above 0"
    unknown = [part for part in config.policy.trainable if part not in PARTS]
    if unknown or not config.policy.trainable:
        yield f"policy.trainable: {unknown or 'nothing'} cannot be trained; choose from {', '.join(PARTS)}"


def _reward_problems(config: Config, job: str) -> Iterator[str]:
    from rlpipe.reward.scorer import SCORERS  # Which itself imports the configuration.

    names = [scorer.name for scorer in config.reward]
    if job == "grpo" and not any(scorer.weight > 0 for scorer in config.reward):
        yield f"reward: {len(names)} scorers with no weight above 0; give one, e.g. reward.0.weight=1"
    total = sum(scorer.weight for scorer in config.reward)
    if job == "grpo" and config.credit.reflection_weight > 0 and 0 < total and abs(total - 1) > 1e-6:
        yield (
            f"reward: the weights sum to {total:g}; the reflection is paid for calling the score, so 1 must mean "
            "Yes: give weights that sum to 1, or set credit.reflection_weight=0"
        )
    for i, scorer in enumerate(config.reward):
        key = f"reward.{i}"
        if not scorer.name or "/" in scorer.name or names.index(scorer.name) != i:
            yield f"{key}.name: {scorer.name!r} is empty, taken or has a slash; give another name"
        if scorer.scorer not in SCORERS and ":" not in scorer.scorer:
            names_known = ", ".join(SCORERS)
            yield f"{key}.scorer: {scorer.scorer!r} is unknown; give {names_known} or package.module:Class"
        if "{prompt}" not in scorer.question:
            yield f"{key}.question: {scorer.question!r} does not ask about the prompt; put {{prompt}} in it"


def _resume_problems(config: Config) -> Iterator[str]:
    """Settings that make another run of the one that `resume: auto` would go on with."""
    folder = Path(config.run.dir)
    stored = folder / "config.yaml"
    if config.resume != "auto" or not stored.is_file() or not (folder / "checkpoints").is_dir():
        return
    before, after = _defining(yaml.safe_load(stored.read_text())), _defining(asdict(config))
    changed = [f"{key} ({before.get(key)!r} -> {after[key]!r})" for key in after if before.get(key) != after[key]]
    if changed:
        yield (
            f"run.dir: {config.run.dir} holds a run with other settings: {', '.join(changed)}; give another run.dir, "
            "or the path of a checkpoint as resume= to go on from it with the new ones"
        )


def _defining(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say what is learned, by key; not where files lie or how fast it goes."""
    keys = {"rollout": ROLLOUT_DEFINES, "train": ("prompts_per_step", "group_size"), "credit": None, "loss": None}
    values = {"seed": config.get("seed")}
    for section, names in keys.items():
        fields_of = config.get(section) or {}
        values |= {f"{section}.{name}": fields_of.get(name) for name in names or fields_of}
    for i, scorer in enumerate(config.get("reward") or ()):
        values |= {f"reward.{i}.{name}": scorer.get(name) for name in ("scorer", "weight", "question")}
    return values


def _file_problems(config: Config, job: str) -> Iterator[str]:
    if not config.run.dir:
        yield "run.dir: empty; give the run's folder, e.g. run.dir=runs/mine"
    if job == "grpo" and config.run.dir:
        yield from _resume_problems(config)
    if config.resume == "never" and config.run.dir and (Path(config.run.dir) / "metrics.jsonl").exists():
        yield f"resume: 'never', but run.dir {config.run.dir} holds a run; change run.dir or set resume=auto"
    if config.resume not in ("auto", "never") and not resolve_path(config.resume).is_dir():
        yield f"resume: {config.resume!r} is no checkpoint folder; give auto, never or an existing one"
    folders = [("policy.path", config.policy.path)]
    if config.reference.path is not None:
        folders.append(("reference.path", config.reference.path))
    for key, path in folders:
        if not (resolve_path(path) / "config.json").is_file():
            yield f"{key}: no config.json in {resolve_path(path)}; give a Janus checkpoint folder"
    for i, scorer in enumerate(config.reward if job == "grpo" else ()):
        if scorer.path is not None and not resolve_path(scorer.path).exists():
            yield f"reward.{i}.path: {resolve_path(scorer.path)} does not exist; give a checkpoint or null"
    if config.sft.data and not resolve_path(config.sft.data).exists():
        yield f'sft.data: {resolve_path(config.sft.data)} does not exist; give a folder or "" (tiny world)'
    prompts = [("data.prompts", config.data.prompts)] if job == "grpo" else []
    for key, path in [*prompts, ("evaluate.prompts", config.evaluate.prompts)]:
        try:
            load_prompts(path)
        except PromptError as error:
            yield from (f"{key}: {problem}" for problem in error.problems)
