from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlpipe.config import Config, ConfigError, load_config, parse_args, resolve_path, to_yaml, validate
from rlpipe.paths import ROOT


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("train:\n  # nothing set\n")
    return path


@pytest.fixture
def runnable(tmp_path: Path) -> list[str]:
    """Overrides that satisfy every check on files."""
    (tmp_path / "policy").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "policy" / name).write_text("{}")
    (tmp_path / "judge").mkdir()
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\n")
    return [
        f"run.dir={tmp_path / 'run'}",
        f"policy.path={tmp_path / 'policy'}",
        f"reward.0.path={tmp_path / 'judge'}",
        f"data.prompts={tmp_path / 'prompts.txt'}",
        f"evaluate.prompts={tmp_path / 'prompts.txt'}",
    ]


def lines_of(function, *args) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value).splitlines()


def test_an_empty_file_gives_the_defaults(empty):
    assert load_config(empty) == Config()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 5, group_size: 4}\nlearner: {betas: [0.8, 0.9], lr: 1e-3}\n")
    config = load_config(path, ["train.steps=7", "learner.lr=3e-4", "learner.betas=[0.5,0.6]"])
    assert (config.train.steps, config.train.group_size) == (7, 4)
    assert config.train.prompts_per_step == Config().train.prompts_per_step
    assert (config.learner.lr, config.learner.betas) == (3e-4, [0.5, 0.6])


@pytest.mark.parametrize("key", ["reward.0.weight", "reward[0].weight"])
def test_a_scorer_is_overridden_by_its_index(empty, key):
    scorer = load_config(empty, [f"{key}=2"]).reward[0]
    assert scorer == replace(Config().reward[0], weight=2.0)


def test_scorers_of_a_file_have_the_schema_defaults_and_may_be_added_to(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("reward:\n  - name: a\n    options: {deep: {x: 1}}\n  - {name: b, weight: 0.5}\n")
    config = load_config(path, ["reward.2.name=c", "reward.0.options.deep.y=2", "reward.1.path=null"])
    assert [s.name for s in config.reward] == ["a", "b", "c"]
    assert [s.scorer for s in config.reward] == ["internvl"] * 3
    assert config.reward[0].options == {"deep": {"x": 1, "y": 2}}
    assert load_config(path, ["reward.0.options={z: 3}"]).reward[0].options == {"z": 3}
    assert config.reward[1].path is None


@pytest.mark.parametrize("text", ["a: b, #c", '"quoted"', "2026-01-01", "1e3", "yes"])
def test_text_fields_take_an_override_as_it_stands(empty, text):
    assert load_config(empty, [f"run.dir={text}"]).run.dir == text.strip('"')


def test_yaml_reads_back_to_the_same_configuration(tmp_path):
    config = load_config(None, ["reward.1.name=second", "reward.1.options.x=[1,2]", "placement.local_cpus=3"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=3", "train.step: no such key; did you mean train.steps?"),
        ("lr=3", "lr: no such key; did you mean learner.lr?"),
        ("rollouts.workers=3", "rollouts: no such key; did you mean rollout?"),
        ("reward.0.wieght=3", "reward.0.wieght: no such key; did you mean reward.0.weight?"),
        ("reward.4.weight=3", "reward.4.weight: no scorer 4; there are 1, counted from 0"),
        ("train.steps=many", "train.steps: 'many' does not fit; give a whole number"),
        ("train.steps=1.5", "train.steps: 1.5 does not fit; give a whole number"),
        ("train.steps.x=1", "train.steps: {'x': 1} does not fit; give a whole number"),
        ("train=3", "train: 3 is no section; give keys such as train.steps"),
        ("placement.local_cpus=all", "placement.local_cpus: 'all' does not fit; give a whole number or null"),
        ("learner.betas=[a]", "learner.betas: ['a'] does not fit; give a list of numbers, e.g. [0.9, 0.95]"),
        ("train.steps", "override: 'train.steps' has no value; write key=value, e.g. train.steps=3"),
    ],
)
def test_a_wrong_key_or_type_is_one_line_with_the_way_out(empty, override, expected):
    assert lines_of(load_config, empty, [override]) == [expected]


def test_all_wrong_keys_and_types_are_told_together(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trian: {steps: 1}\nrollout: {workers: two}\nreward: [{weigth: 1}, 3]\n")
    lines = lines_of(load_config, path, ["seed=x"])
    assert [line.split(":")[0] for line in lines] == [
        "trian",
        "reward.0.weigth",
        "reward.1",
        "seed",
        "rollout.workers",
    ]


@pytest.mark.parametrize("text", ["train: [", "- 1\n- 2", "train: {steps: 1}\ntrain: {steps: 2}"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    (line,) = lines_of(load_config, path)
    assert line.startswith("--config:") and "broken.yaml" in line


def test_a_runnable_configuration_passes(empty, runnable):
    config = load_config(empty, runnable)
    assert validate(config) is config


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["train.group_size=1"], ["train.group_size"]),
        (["rollout.max_images=3"], ["rollout.max_images"]),
        (["policy.dtype=float16"], ["policy.dtype"]),
        (["learner.lr=0", "learner.min_lr=0"], ["learner.lr"]),
        (["learner.lr=nan"], ["learner.lr"]),
        (["learner.betas=[0.9,1.0]"], ["learner.betas"]),
        (["rollout.image_top_p=0"], ["rollout.image_top_p"]),
        (["rollout.rows=0"], ["rollout.rows"]),
        (["rollout.rows=many", "rollout.branches=0"], ["rollout.branches", "rollout.rows"]),
        (["rollout.rows=4", "rollout.reflection_room=group"], ["rollout.rows"]),
        (["rollout.branches=3"], ["rollout.branches"]),
        (["sft.draw=0", "sft.judge=0", "sft.redraw=0"], ["sft.draw"]),
        (["credit.rule=v3"], ["rollout.redraw"]),
        (["credit.rule=v2", "rollout.redraw_context=reencoded"], ["rollout.redraw_context"]),
        (["credit.rule=single"], ["credit.rule"]),
        (["rollout.program=draw"], ["credit.rule"]),
        (["credit.rule=summed", "credit.final_weight=2"], ["credit.final_weight"]),
        (["decline.action=react", "loss.kl_beta=0"], ["decline.action"]),
        (["decline.lr_factor=0", "decline.kl_factor=2"], ["decline.lr_factor", "decline.kl_factor"]),
        (["loss.clip=0"], ["loss.clip"]),
        (["loss.clip=null", "loss.clip_high=0.28"], ["loss.clip_high"]),
        (["loss.clip_high=0.28", "loss.correction=masked"], ["loss.clip_high"]),
        (["loss.ratio=segment", "loss.logits=scaled", "rollout.guidance=2"], ["loss.ratio"]),
        (
            ["loss.ratio=trajectory", "loss.kl=k4", "loss.correction_cap=0.5"],
            ["loss.ratio", "loss.correction_cap", "loss.kl"],
        ),
        (["credit.baseline=leave_one_out"], ["credit.baseline"]),
        (["credit.weighting=tokens", "credit.redraws=-1"], ["credit.weighting", "credit.redraws"]),
        (["loss.entropy.mode=bonus"], ["loss.entropy.weight"]),
        (["loss.entropy.mode=adaptive"], ["loss.entropy.image_target"]),
        (
            ["loss.entropy.image_target=7", "loss.entropy.weight=0.1"],
            ["loss.entropy.weight", "loss.entropy.image_target"],
        ),
        (["credit.rule=v3", "rollout.redraw=always", "rollout.max_images=1"], ["rollout.max_images"]),
        (["loss.logits=scaled", "max_staleness=1", "rollout.guidance=2"], ["loss.logits"]),
        (["learner.schedule=linear_then_cosine", "learner.convert_lr=1e-4"], ["learner.convert_steps"]),
        (["policy.trainable=[vision]"], ["policy.trainable"]),
        (["sync.transport=nccl"], ["sync.transport"]),
        (["sync.transport=nccl", "learner.num_gpus=0.5", "rollout.num_gpus=1"], ["sync.transport"]),
        (["train.keep_every=30", "train.export_every=30"], ["train.keep_every", "train.export_every"]),
        (["sync.transport=mpi", "sync.bucket_mib=0"], ["sync.transport", "sync.bucket_mib"]),
        (["reward.1.name=judge", "reward.1.weight=0"], ["reward.1.name"]),
        (["reward.0.question=Is it good?"], ["reward.0.question"]),
        (["reward.0.weight=0"], ["reward"]),
        (["reward.0.scorer=internvll"], ["reward.0.scorer"]),
        (["resume=somewhere"], ["resume"]),
        (["policy.path=nowhere"], ["policy.path"]),
        (["reward.0.path=nowhere"], ["reward.0.path"]),
        (["data.prompts=nowhere.jsonl"], ["data.prompts"]),
        (["evaluate.prompts=nowhere.txt", "seed=-1"], ["seed", "evaluate.prompts"]),
    ],
)
def test_every_problem_of_a_value_is_named_once(empty, runnable, overrides, fields):
    config = load_config(empty, [*runnable, "reward.0.name=judge", *overrides])
    told = [line.split(":")[0] for line in lines_of(validate, config)]
    assert [field for field in told if field != "reward.1.path"] == fields


@pytest.mark.parametrize(
    "overrides",
    [
        ["credit.rule=v3", "rollout.redraw=always"],
        ["credit.rule=v2", "rollout.redraw=always", "rollout.redraw_context=reencoded"],
        ["rollout.redraw=always"],
        ["rollout.rows=4", "rollout.branches=4"],
        ["credit.rule=summed", "rollout.max_images=3"],
        ["credit.rule=segments", "rollout.max_images=4"],
        ["credit.rule=single", "rollout.program=draw", "reward.0.weight=0.5"],
        ["loss.clip=null"],
        ["loss.ratio=segment", "loss.clip=3e-4", "loss.clip_high=4e-4", "max_staleness=1"],
        ["loss.correction=truncated", "max_staleness=2", "loss.kl=k2"],
        ["credit.baseline=leave_one_out", "credit.std=none", "credit.weighting=token", "credit.redraws=2"],
        ["loss.entropy.mode=adaptive", "loss.entropy.image_target=7.0"],
        ["loss.entropy.mode=bonus", "loss.entropy.weight=0.01"],
        ["decline.action=react"],
        ["loss.logits=scaled", "rollout.guidance=2"],
        ["loss.logits=scaled", "max_staleness=1"],
        ["learner.schedule=linear_then_cosine", "learner.convert_steps=20", "learner.convert_lr=1e-4"],
        ["train.steps=1"],
        ["train.keep_every=40", "train.export_every=40"],
        ["sync.transport=nccl", "learner.num_gpus=1", "rollout.num_gpus=1"],
    ],
)
def test_combinations_that_make_sense_pass(empty, runnable, overrides):
    validate(load_config(empty, [*runnable, *overrides]))


def test_bad_prompt_rows_are_named_with_the_field_file_and_line(empty, runnable, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": ""}\nnot json\n')
    lines = lines_of(validate, load_config(empty, [*runnable, f"data.prompts={bad}"]))
    assert len(lines) == 2
    assert lines[0].startswith(f"data.prompts: {bad}:2: ") and lines[1].startswith(f"data.prompts: {bad}:3: ")


def test_sft_needs_neither_scorers_nor_training_prompts(empty, runnable):
    config = load_config(empty, [*runnable, "reward.0.path=nowhere", "data.prompts=nowhere.txt"])
    validate(config, job="sft")


def test_never_resuming_refuses_a_used_folder(empty, runnable, tmp_path):
    config = load_config(empty, [*runnable, "resume=never"])
    validate(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert lines_of(validate, config)[0].startswith("resume: 'never'")


def test_a_dry_run_prints_what_would_run(empty, runnable, capsys):
    config, dry_run = parse_args("test", str(empty), ["train.steps=3", "--dry-run", *runnable])
    assert dry_run and config.train.steps == 3
    assert capsys.readouterr().out == to_yaml(config)


def test_a_run_prints_nothing(empty, runnable, capsys):
    config, dry_run = parse_args("test", "nowhere.yaml", [*runnable, "--config", str(empty), "seed=3"])
    assert (config.seed, dry_run, capsys.readouterr().out) == (3, False, "")


def test_shipped_configurations_load_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(f"configs/{path.name}")
    assert load_config() == load_config(ROOT / "configs/tiny_grpo.yaml")


def test_a_path_is_the_working_directory_s_before_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("rlpipe/config.py") == ROOT / "rlpipe/config.py"
    (tmp_path / "rlpipe").mkdir()
    (tmp_path / "rlpipe/config.py").touch()
    assert resolve_path("rlpipe/config.py") == tmp_path / "rlpipe/config.py"
    assert resolve_path("nowhere") == tmp_path / "nowhere"


@pytest.mark.parametrize("wrong", [["train.step=1", "seed=x"], ["credit.rule=v3", "policy.path=nowhere"]])
def test_mistakes_are_told_without_importing_torch_or_ray_and_without_a_traceback(wrong, runnable):
    program = (
        "import json, sys\n"
        "from rlpipe.config import parse_args\n"
        "try:\n"
        f"    parse_args('test', argv={[*runnable, *wrong]!r})\n"
        "except SystemExit as stop:\n"
        "    heavy = sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules))\n"
        "    print(json.dumps([stop.code, heavy]))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [2, []]
    assert len(done.stderr.splitlines()) == 2, done.stderr


def test_a_run_folder_is_not_resumed_under_other_settings(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(None, [f"run.dir={run}"])))
    validate(load_config(None, [f"run.dir={run}", "train.steps=500", "rollout.threads=1"]))
    with pytest.raises(ConfigError, match=r"loss\.kl_beta \(0\.04 -> 0\.1\).*give another run\.dir"):
        validate(load_config(None, [f"run.dir={run}", "loss.kl_beta=0.1"]))
    older = (run / "config.yaml").read_text().replace("  baseline: mean\n", "")
    assert "baseline" not in older
    (run / "config.yaml").write_text(older)
    validate(load_config(None, [f"run.dir={run}"]))
    with pytest.raises(ConfigError, match=r"credit\.baseline \('mean' -> 'leave_one_out'\)"):
        validate(load_config(None, [f"run.dir={run}", "credit.baseline=leave_one_out", "credit.std=none"]))


ROLES = {
    "reward.0.rewards=[generation,truth]": "reward.0.rewards: 'truth' is none of generation, comprehension",
    "reward.0.sees=[all]": "reward.0.sees: 'all' is none of every_image, first_image, final_image, verdict",
    "reward.0.sees=[every_image,final_image]": "names 2 kinds of images; give one of every_image",
    "reward.0.sees=[verdict]": "names 0 kinds of images",
    "reward.0.rewards=[]": "reward.0.rewards: nothing, with weight 1",
    "reward.0.sees=[every_image,source_image]": "source_image is there with rollout.program=edit alone",
    "reward.0.canary=true": "reward.0.canary: true, but its weight 1 trains on it; set reward.0.weight=0",
    "reward.0.name=final": "reward.0.name: reward/final/mean is another metric's name",
    "reward.0.rewards=[generation]": "no scorer with a weight has rewards comprehension",
    "reward.0.sees=[final_image]": "comprehension needs every image that is looked at, and judge sees final_image",
}


@pytest.mark.parametrize("override", ROLES)
def test_what_a_scorer_sees_and_is_for_is_checked(override):
    with pytest.raises(ConfigError, match=re.escape(ROLES[override])):
        validate(load_config(None, [override]))


def test_the_first_image_is_all_that_is_looked_at_with_two_images():
    validate(load_config(None, ["reward.0.sees=[first_image]"]))
    with pytest.raises(ConfigError, match="comprehension needs every image"):
        validate(load_config(None, ["reward.0.sees=[first_image]", "rollout.max_images=3", "credit.rule=summed"]))
    validate(load_config(None, ["reward.0.rewards=[generation]", "credit.reflection_weight=0"]))


JANUS_PRO = [
    "janus_pro_7b_grpo",
    "janus_pro_7b_grpo_paper",
    "janus_pro_1b_grpo",
    "janus_pro_1b_one_gpu",
    "janus_pro_7b_one_node",
    "janus_pro_7b_nodes",
]


@pytest.mark.parametrize("name", JANUS_PRO)
def test_a_janus_pro_configuration_passes_once_its_paths_are_given(name, tmp_path):
    paths = [
        f"run.dir={tmp_path / 'run'}",
        "policy.path=rlpipe/world/assets/policy",
        "reward.0.path=rlpipe/world/assets/judge",
        "data.prompts=rlpipe/world/assets/prompts_train.jsonl",
    ]
    config, dry_run = parse_args("test", argv=["--config", f"configs/{name}.yaml", "--dry-run", *paths])
    assert dry_run and config.policy.dtype == "bfloat16"
    told = lines_of(validate, load_config(f"configs/{name}.yaml", [f"run.dir={tmp_path / 'run'}"]))
    assert [line.split(":")[0] for line in told] == ["policy.path", "reward.0.path", "data.prompts"]


def test_the_official_configuration_has_the_official_numbers():
    config = load_config("configs/janus_pro_7b_grpo.yaml")
    credit, loss, learner, rollout = config.credit, config.loss, config.learner, config.rollout
    assert (credit.rule, credit.std, credit.std_eps) == ("v1", "sample", 1e-4)
    assert (credit.first_weight, credit.reflection_weight, credit.final_weight) == (1, 1, 1)
    assert (loss.logits, loss.clip, loss.kl_beta, loss.verdict) == ("scaled", 0.2, 0.04, "full")
    assert (loss.train_eos, loss.context, config.reference.context) == (False, "constant", "policy")
    assert (learner.lr, learner.convert_lr, learner.min_lr) == (3e-7, 1e-7, 5e-8)
    assert (learner.schedule, learner.warmup_steps, learner.convert_steps) == ("linear_then_linear", 5, 30)
    assert (learner.betas, learner.eps, learner.weight_decay, learner.clip_norm) == ([0.9, 0.999], 1e-8, 0, 1)
    assert (rollout.guidance, rollout.max_reflection_tokens, rollout.max_images) == (5, 80, 2)
    assert (rollout.redraw_context, rollout.reflection_room) == ("reencoded", "group")
    assert config.train.prompts_per_step * config.train.group_size == 256 and config.decline.action == "none"


def test_the_paper_s_configuration_has_the_paper_s_numbers():
    config = load_config("configs/janus_pro_7b_grpo_paper.yaml")
    learner, rollout = config.learner, config.rollout
    assert (rollout.max_images, rollout.history, config.credit.rule) == (3, "all", "summed")
    assert (config.loss.kl_beta, config.train.group_size, config.train.steps) == (0.05, 7, 3000)
    assert (learner.lr, learner.convert_lr, learner.min_lr) == (6e-6, 2e-6, 2e-7)
    assert (learner.schedule, learner.warmup_steps, learner.convert_steps) == ("linear_then_cosine", 100, 400)
    assert (learner.betas, learner.eps, learner.weight_decay) == ([0.9, 0.95], 1e-6, 0.05)
    assert config.decline.action == "react"
