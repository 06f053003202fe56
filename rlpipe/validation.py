"""What a configuration must satisfy beyond its types: ranges, choices, rules across fields, files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpipe.data.factory import factory_problems
from rlpipe.data.labels import sft_problems
from rlpipe.data.outputs import Results, generation_prompts, program_of, settings_of
from rlpipe.data.prompts import PromptError, load_prompts
from rlpipe.data.scored import score_problems
from rlpipe.evaluate.judged import calibration_problems
from rlpipe.limits import ABOVE_ZERO, ALSO_SEEN, AT_LEAST, CHOICES, IMAGES_SEEN, REWARD_NAMES, REWARDS, SHARES
from rlpipe.paths import resolve_path
from rlpipe.policy.adapter import adapter_problems
from rlpipe.schema import Config, ScorerSection
from rlpipe.validation_learner import learner_problems

ROLLOUT_DEFINES = (
    "guidance",
    "image_temperature",
    "text_temperature",
    "max_reflection_tokens",
    "max_images",
    "branches",
    "program",
    "redraw",
    "redraw_context",
    "history",
    "reflection_room",
)


def problems_of(config: Config, job: str = "grpo") -> list[str]:
    """One line for each thing that is wrong, in the order of the schema: field, value, way out."""
    problems = [line for key, value in _values(config) for line in _range_problems(key, value)]
    problems += _rows_problems(config, job)
    if job == "generate":
        return problems + list(_generate_problems(config))
    if job in ("score", "calibrate"):
        return problems + list(_scoring_problems(config, job))
    problems += _sampling_problems(config)
    if job == "grpo":
        problems += _credit_problems(config)
        problems += _loss_problems(config)
    problems += learner_problems(config)
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
    elif rule in ABOVE_ZERO and value is not None and value <= 0:
        yield f"{key}: {value} is not positive; give a number above 0"
    elif rule in SHARES and not 0 <= value <= 1:
        yield f"{key}: {value} is no share; give a number from 0 to 1"
    elif rule.endswith("_top_p") and value == 0:
        yield f"{key}: 0 keeps no token; give 1.0 to switch truncation off, or a share above 0"


def _sampling_problems(config: Config) -> Iterator[str]:
    rollout, loss = config.rollout, config.loss
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
    if config.reference.context == "policy" and config.max_staleness > 0 and loss.kl_beta > 0:
        yield (
            f"reference.context: 'policy' embeds with the newest weights, not those that drew samples of max_staleness "
            f"{config.max_staleness}; set reference.context=own or max_staleness=0"
        )
    for key, top_k in (("image", rollout.image_top_k), ("text", rollout.text_top_k)):
        if top_k == 1:
            yield f"rollout.{key}_top_k: 1 always takes the likeliest token, which teaches nothing; give 0 or above 1"
    for scale in config.evaluate.guidance_sweep:
        if not (math.isfinite(scale) and scale > 0):
            yield f"evaluate.guidance_sweep: {scale} is no guidance scale; give numbers above 0"


def _rows_problems(config: Config, job: str) -> Iterator[str]:
    """Of how many rows are drawn at once, and how many share a first image."""
    rollout, group = config.rollout, config.train.group_size
    if rollout.cache_dtype != "auto" and rollout.num_gpus <= 0:
        yield f"rollout.cache_dtype: {rollout.cache_dtype} saves memory on a GPU alone; set auto, or rollout.num_gpus"
    if rollout.rows != "auto" and not (rollout.rows.isdecimal() and int(rollout.rows) > 0):
        yield f"rollout.rows: {rollout.rows!r} is no number of rows; give 1 or more, or auto"
    elif rollout.rows != "auto" and rollout.reflection_room == "group" and job == "grpo" and int(rollout.rows) < group:
        yield (
            f"rollout.rows: {rollout.rows} is fewer than train.group_size {group}, which rollout.reflection_room group "
            f"looks at together; give {group} or more"
        )
    if job != "grpo" or rollout.branches == 1:
        return
    if rollout.program != "introspect":
        yield f"rollout.branches: {rollout.branches} branches need redraws, not program {rollout.program}; set it to 1"
    elif rollout.branches > 1 and group % rollout.branches:
        yield (
            f"rollout.branches: {rollout.branches} does not divide train.group_size {group}; "
            "give a divisor, so that every first image has as many branches"
        )


def _credit_problems(config: Config) -> Iterator[str]:
    """Of what the credit rule needs of the rollouts, and of the reaction to a declining curve."""
    rollout, rule, decline = config.rollout, config.credit.rule, config.decline
    if (rollout.program == "introspect") == (rule == "single"):
        way_out = "rollout.program=draw or edit, or another rule" if rule == "single" else "credit.rule=single"
        yield f"credit.rule: {rule!r} does not fit the trajectories of rollout.program {rollout.program}; set {way_out}"
    if rule in ("v1", "v2", "v3") and rollout.max_images > 2:
        yield (
            f"rollout.max_images: {rollout.max_images} is more than the 2 that credit.rule {rule} credits; "
            "set it to 2, or credit.rule=summed or segments"
        )
    if rule == "v3" and rollout.redraw != "always":
        yield f"rollout.redraw: {rollout.redraw!r} has no second image for credit.rule v3; set it to always"
    if rule == "v2" and rollout.redraw_context == "reencoded" and rollout.redraw != "always":
        yield (
            "rollout.redraw_context: 'reencoded' gives credit.rule v2 no context after a Yes; set it to sampled, "
            "or rollout.redraw=always"
        )
    for name in ("first_weight", "reflection_weight", "final_weight"):
        if rule in ("summed", "single") and getattr(config.credit, name) != 1:
            yield f"credit.{name}: {getattr(config.credit, name):g} has no term under credit.rule {rule}; set it to 1"
    if config.credit.balance_verdicts and rule in ("summed", "single"):
        yield f"credit.balance_verdicts: true has no reflections of their own under credit.rule {rule}; set it to false"
    if config.credit.baseline == "leave_one_out" and config.credit.std != "none":
        yield (
            f"credit.baseline: 'leave_one_out' with credit.std {config.credit.std!r} is the group's mean once more, "
            "scaled by n / (n - 1); set credit.std=none, or credit.baseline=mean"
        )
    if decline.action != "none" and config.loss.kl_beta == 0:
        yield (
            f"decline.action: {decline.action!r} works on the KL weight and the reference, and loss.kl_beta is 0; "
            "set it above 0, or decline.action=none"
        )


def _loss_problems(config: Config) -> Iterator[str]:
    """Of forms of the loss that do not go together."""
    loss, entropy = config.loss, config.loss.entropy
    if loss.clip_high is not None and (loss.clip is None or loss.correction != "clipped"):
        off = "loss.clip null" if loss.clip is None else f"loss.correction {loss.correction}"
        yield f"loss.clip_high: {loss.clip_high:g} has no effect with {off}; set loss.clip_high=null, or clip below too"
    if loss.ratio != "token" and loss.logits != "guided" and config.rollout.guidance != 1.0:
        yield (
            f"loss.ratio: {loss.ratio!r} is taken to the sampler, and loss.logits {loss.logits!r} scores images under "
            f"another distribution than was sampled at rollout.guidance {config.rollout.guidance:g}; set "
            "loss.logits=guided, or loss.ratio=token"
        )
    targets = {k: getattr(entropy, k) for k in ("image_target", "text_target") if getattr(entropy, k) is not None}
    if entropy.mode == "bonus" and not entropy.weight:
        yield "loss.entropy.weight: 0 is no bonus; give a number above 0, or loss.entropy.mode=none"
    if entropy.mode != "bonus" and entropy.weight:
        yield f"loss.entropy.weight: {entropy.weight:g} has no effect in loss.entropy.mode {entropy.mode}; set it to 0"
    if entropy.mode == "adaptive" and not targets:
        yield "loss.entropy.image_target: adaptive has no target; give nats, e.g. image_target=7.0, text_target=2.0"
    if entropy.mode != "adaptive":
        for key, value in targets.items():
            yield f"loss.entropy.{key}: {value:g} has no effect with loss.entropy.mode {entropy.mode}; set it to null"
    if config.rollout.program != "introspect" and "text_target" in targets:
        yield f"loss.entropy.text_target: rollout.program {config.rollout.program} has no reflections; set it to null"


def _generate_problems(config: Config) -> Iterator[str]:
    """Of what is drawn, and of the folder that it goes to as it is now."""
    section, resume = config.generate, config.resume
    if section.verdict_threshold is not None and not 0 <= section.verdict_threshold <= 1:
        yield f"generate.verdict_threshold: {section.verdict_threshold:g} is no probability; give 0 to 1, or null"
    if resume not in ("auto", "never"):
        yield f"resume: {resume!r} is no way to go on with samples; give auto or never, and a checkpoint as policy.path"
    try:
        prompts = generation_prompts(config)
    except PromptError as error:
        yield from error.problems
        prompts = []
    checkpoint = list(_checkpoint_problems(config, job="generate"))
    yield from checkpoint
    if not section.dir:
        yield "generate.dir: empty; give the folder of the samples, e.g. generate.dir=results"
    elif prompts and not checkpoint:
        yield from Results(section.dir, program_of(config)).problems(settings_of(config, prompts), resume)


def _scoring_problems(config: Config, job: str) -> Iterator[str]:
    """Of the scorers, and of the images that they score or the scores that are there."""
    if job == "score" or not config.calibrate.scores:
        yield from _reward_problems(config, job)
        yield from _scorer_path_problems(config)
    yield from score_problems(config) if job == "score" else calibration_problems(config)


def _reward_problems(config: Config, job: str) -> Iterator[str]:
    from rlpipe.reward.scorer import SCORERS  # Which itself imports the configuration.

    names = [scorer.name for scorer in config.reward]
    if job == "grpo" and not any(scorer.weight > 0 for scorer in config.reward):
        yield f"reward: {len(names)} scorers with no weight above 0; give one, e.g. reward.0.weight=1"
    for i, scorer in enumerate(config.reward):
        key = f"reward.{i}"
        if not scorer.name or "/" in scorer.name or names.index(scorer.name) != i:
            yield f"{key}.name: {scorer.name!r} is empty, taken or has a slash; give another name"
        if scorer.name in REWARD_NAMES or re.fullmatch(r"(image|reflection)_\d+", scorer.name):
            yield f"{key}.name: reward/{scorer.name}/mean is another metric's name; give another name"
        if scorer.scorer not in SCORERS and ":" not in scorer.scorer:
            names_known = ", ".join(SCORERS)
            yield f"{key}.scorer: {scorer.scorer!r} is unknown; give {names_known} or package.module:Class"
        if "{prompt}" not in scorer.question:
            yield f"{key}.question: {scorer.question!r} does not ask about the prompt; put {{prompt}} in it"
        if scorer.canary and scorer.weight:
            yield f"{key}.canary: true, but its weight {scorer.weight:g} trains on it; set {key}.weight=0"
        yield from _role_problems(config, scorer, key, job)
    if job == "grpo":
        yield from _comprehension_problems(config)


def _role_problems(config: Config, scorer: ScorerSection, key: str, job: str) -> Iterator[str]:
    """Of what a scorer sees and what its score enters."""
    for name, known in (("rewards", REWARDS), ("sees", (*IMAGES_SEEN, *ALSO_SEEN))):
        unknown = [value for value in getattr(scorer, name) if value not in known]
        if unknown:
            yield f"{key}.{name}: {unknown[0]!r} is none of {', '.join(known)}"
    images = [value for value in scorer.sees if value in IMAGES_SEEN]
    if len(images) != 1:
        yield f"{key}.sees: {scorer.sees} names {len(images)} kinds of images; give one of {', '.join(IMAGES_SEEN)}"
    if scorer.weight and not scorer.rewards:
        yield f"{key}.rewards: nothing, with weight {scorer.weight:g}; give generation, comprehension or weight 0"
    if job in ("score", "calibrate"):
        return
    if "source_image" in scorer.sees and config.rollout.program != "edit":
        yield f"{key}.sees: source_image is there with rollout.program=edit alone; leave it out"
    if "verdict" in scorer.sees and config.rollout.program != "introspect":
        yield f"{key}.sees: verdict is there with rollout.program=introspect alone; leave it out"


def _comprehension_problems(config: Config) -> Iterator[str]:
    """Of the scorers that verdicts are held against: they have to see every image that is looked at."""
    if config.rollout.program != "introspect" or not config.credit.reflection_weight:
        return
    judges = [(i, s) for i, s in enumerate(config.reward) if s.weight > 0 and "comprehension" in s.rewards]
    if not judges and any(s.weight > 0 for s in config.reward):
        yield (
            "reward: no scorer with a weight has rewards comprehension, which the reflection is paid by; "
            "give it to one, or set credit.reflection_weight=0"
        )
    looked_at = {"every_image", *(["first_image"] if config.rollout.max_images <= 2 else [])}
    for i, scorer in judges:
        if looked_at.isdisjoint(scorer.sees):
            yield (
                f"reward.{i}.rewards: comprehension needs every image that is looked at, and {scorer.name} sees "
                f"{', '.join(scorer.sees)}; set reward.{i}.rewards=[generation] or reward.{i}.sees=[every_image]"
            )


def _scorer_path_problems(config: Config) -> Iterator[str]:
    for i, scorer in enumerate(config.reward):
        if scorer.path is not None and not resolve_path(scorer.path).exists():
            yield f"reward.{i}.path: {resolve_path(scorer.path)} does not exist; give a checkpoint or null"


def _resume_problems(config: Config) -> Iterator[str]:
    """Settings that make another run of the one that `resume: auto` would go on with."""
    folder = Path(config.run.dir)
    stored = folder / "config.yaml"
    if config.resume != "auto" or not stored.is_file() or not (folder / "checkpoints").is_dir():
        return
    before, after = _defining(yaml.safe_load(stored.read_text())), _defining(asdict(config))
    # A key that the stored run does not have was at what is its default.
    before = _defining(asdict(Config())) | before
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
        values |= {
            f"reward.{i}.{name}": scorer.get(name) for name in ("scorer", "weight", "question", "rewards", "sees")
        }
    return values


def _checkpoint_problems(config: Config, job: str) -> Iterator[str]:
    """What can be told of checkpoint folders without reading a tensor."""
    folders = [("policy.path", config.policy.path)]
    if config.reference.path is not None and job != "generate":
        folders.append(("reference.path", config.reference.path))
    for key, path in folders:
        folder = resolve_path(path)
        missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
        if missing:
            yield f"{key}: no {' and no '.join(missing)} in {folder}; give a Janus checkpoint folder"
        elif not any(folder.glob(pattern) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
            yield f"{key}: no model*.safetensors and no pytorch_model*.bin in {folder}; complete the download"
    overlay, lora = config.policy.overlay, config.policy.lora
    if overlay is not None and not resolve_path(overlay).is_file():
        yield f"policy.overlay: no file {resolve_path(overlay)}; give a state dict (.pth, .safetensors) or null"
    if lora.path is not None and not lora.rank:
        yield "policy.lora.rank: 0 trains no adapter, and policy.lora.path names one; set its rank, or the path to null"
    elif job != "generate":
        yield from adapter_problems(lora)
    if lora.rank and not lora.targets:
        yield "policy.lora.targets: no layer to adapt; give names such as q_proj, or set policy.lora.rank=0"
    if lora.rank and lora.dropout and job == "grpo":
        yield (
            f"policy.lora.dropout: {lora.dropout} makes the learner another policy than the sampler; use 0 here "
            "(supervised fine-tuning may have it)"
        )


def _file_problems(config: Config, job: str) -> Iterator[str]:
    if not config.run.dir:
        yield "run.dir: empty; give the run's folder, e.g. run.dir=runs/mine"
    if job == "grpo" and config.run.dir:
        yield from _resume_problems(config)
    if config.resume == "never" and config.run.dir and (Path(config.run.dir) / "metrics.jsonl").exists():
        yield f"resume: 'never', but run.dir {config.run.dir} holds a run; change run.dir or set resume=auto"
    if config.resume not in ("auto", "never") and not resolve_path(config.resume).is_dir():
        yield f"resume: {config.resume!r} is no checkpoint folder; give auto, never or an existing one"
    yield from _checkpoint_problems(config, job)
    if job in ("grpo", "factory"):
        yield from _scorer_path_problems(config)
    if job == "sft":
        yield from sft_problems(config)
    if job == "factory":
        yield from factory_problems(config)
    prompts = [("data.prompts", config.data.prompts)] if job in ("grpo", "factory") else []
    for key, path in [*prompts, ("evaluate.prompts", config.evaluate.prompts)]:
        try:
            rows = load_prompts(path)
        except PromptError as error:
            yield from (f"{key}: {problem}" for problem in error.problems)
            continue
        bare = next((prompt.id for prompt in rows if prompt.source_image is None), None)
        if job == "grpo" and config.rollout.program == "edit" and bare is not None:
            yield f"{key}: prompt {bare!r} has no source_image; rollout.program edit needs one in every row"
