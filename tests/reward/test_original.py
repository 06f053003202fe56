"""Original InternVL checkpoints: the converted judge computes what the original layers do, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2TokenizerFast

from launch.convert_judge import main
from rlpipe.reward.backend import Query, build_backend
from rlpipe.reward.convert import Plan, write
from rlpipe.reward.internvl import InternVLJudge, JudgeFormat, load
from rlpipe.reward.original import OriginalError
from rlpipe.reward.spm import read_tokenizer
from rlpipe.types import Prompt, ScoreRequest
from tests.reward import originals
from tests.reward.originals import Plain

QUESTION = "Is the circle {prompt}? Please respond with yes or no."


def convert(source: Path, **keywords) -> Path:
    out = source.with_name(source.name + "-hf")
    write(Plan.of(source, **keywords), out, report=lambda line: None)
    return out


def both(folder: Path, language: str, length: int = 12, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an original checkpoint by the plain model, and of the converted one, for the same ids and tiles."""
    weights = originals.build(folder, language, **changes)
    model, tokenizer = load(convert(folder))
    raw = json.loads((folder / "config.json").read_text())
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(260, 300, (length,), generator=generator)
    ids[2:10] = image
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    with torch.no_grad():
        return Plain(raw, weights, image).logits(ids, pixels), model(input_ids=ids[None], pixel_values=pixels).logits[0]


@pytest.mark.parametrize(
    ("language", "changes"),
    [
        ("internlm2", {}),
        ("internlm2", {"llm__bias": True}),
        ("internlm2", {"llm__num_key_value_heads": 4}),
        ("internlm2", {"llm__num_key_value_heads": 1, "llm__rope_scaling": None}),
        ("internlm2", {"llm__rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("internlm2", {"llm__max_position_embeddings": 8}),
        ("internlm2", {"select_layer": -2}),
        ("internlm2", {"llm__tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen2", {"llm__tie_word_embeddings": True, "select_layer": 2}),
    ],
)
def test_the_converted_model_has_the_logits_of_the_original_layers(tmp_path, language, changes):
    plain, converted = both(tmp_path / "model", language, **changes)
    torch.testing.assert_close(converted, plain, atol=2e-5, rtol=1e-4)
    assert plain.std(1).min() > 0.1 and not torch.allclose(plain[-1], plain[-2], atol=1e-2)


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_many_files_becomes_one_in_many_others(tmp_path, language, kind):
    originals.build(tmp_path / "one", language)
    originals.build(tmp_path / "many", language, shards=3, kind=kind)
    whole, shards = convert(tmp_path / "one"), convert(tmp_path / "many", shard_bytes=60_000)
    expected = load_file(whole / "model.safetensors")
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(shards / file) for file in set(index.values())}
    assert len(files) > 3 and sorted(shards.glob("*.safetensors")) == sorted(shards / file for file in files)
    assert {name: file for file, tensors in files.items() for name in tensors} == index
    assert index.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(files[index[name]][name], tensor, atol=0, rtol=0)
    model, loaded = load(shards)[0], load(whole)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_only_fused_tensors_are_copied_on_their_way_into_a_shard(tmp_path):
    originals.build(tmp_path / "model", "internlm2")
    plan = Plan.of(tmp_path / "model")
    for key, tensor in plan.tensors.items():
        parts = plan.layout.parts(key, tensor)
        same = [part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in parts.values()]
        assert same == [True] or (key.endswith(("qkv.weight", "qkv.bias")) and len(same) == 3), key
        assert sum(part.numel() for part in parts.values()) == tensor.numel()


def test_weights_keep_their_type(tmp_path):
    weights = originals.build(tmp_path / "model", "internlm2")
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(half, tmp_path / "model" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    out = convert(tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert {part["dtype"] for part in (config, config["text_config"], config["vision_config"])} == {"bfloat16"}


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_the_converted_judge_answers_as_the_original_layers_do(tmp_path, language):
    weights = originals.build(tmp_path / "model", language)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    judge = InternVLJudge(convert(tmp_path / "model"), QUESTION)
    score = judge.score([ScoreRequest("0", Prompt("0", "red"), image)])[0]

    ids = {token: int(i) for i, token in added(tmp_path / "model").items()}
    if language == "internlm2":
        model, start = (tmp_path / "model" / "tokenizer.model").read_bytes(), [ids["<s>"]]
        text = lambda words: originals.spm_pieces(model, words)  # noqa: E731
    else:
        tokenizer, start = Qwen2TokenizerFast.from_pretrained(tmp_path / "model"), []
        text = lambda words: tokenizer.encode(words, add_special_tokens=False)  # noqa: E731
    tiles = [ids["<img>"], *[ids["<IMG_CONTEXT>"]] * 4, ids["</img>"]]
    chat = [*start, ids["<|im_start|>"], *text("user\n"), *tiles, *text("\n" + QUESTION.format(prompt="red"))]
    chat += [ids["<|im_end|>"], *text("\n"), ids["<|im_start|>"], *text("assistant\n")]
    pixels = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    tile = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    plain = Plain(json.loads((tmp_path / "model" / "config.json").read_text()), weights, ids["<IMG_CONTEXT>"])
    logits = plain.logits(torch.tensor(chat), tile)[-1].double()
    yes, no = (sum(logits[text(word)[0]].exp() for word in words) for words in (judge_words("yes"), judge_words("no")))
    assert score.error is None and score.value == pytest.approx(float(yes / (yes + no)), abs=1e-5)


def judge_words(word: str) -> tuple[str, str, str]:
    return word, word.capitalize(), word.upper()


def added(folder: Path) -> dict[str, str]:
    """Added token by id, of the original files."""
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return {i: token["content"] for i, token in tokens.items()}


# the tokenizer


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_model_splits_texts_as_before(tmp_path, prefix):
    originals.spm_tokenizer(tmp_path, prefix)
    model, tokenizer = (tmp_path / "tokenizer.model").read_bytes(), read_tokenizer(tmp_path)
    random = np.random.default_rng(0)
    words = ["red", "circle", "yesno", "NOyes", "the  ", "\n", " ", "\u00e4\u4e2d", "\U0001f600", "userassistant", "."]
    for text in (" ".join(random.choice(words, 6)) for _ in range(200)):
        assert tokenizer.encode(text, add_special_tokens=False) == originals.spm_pieces(model, text)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_added_tokens_keep_their_ids_and_a_text_cannot_spell_them(tmp_path, language):
    originals.build(tmp_path / "model", language)
    _, tokenizer = load(convert(tmp_path / "model"))
    for index, token in added(tmp_path / "model").items():
        assert tokenizer.encode(token, add_special_tokens=False) == [int(index)]
        assert tokenizer.decode([int(index)]) == token
        assert len(tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)) > 1
    assert tokenizer.encode("") == ([1] if language == "internlm2" else [])
    assert tokenizer.start_image_token == "<img>" and tokenizer.context_image_token == "<IMG_CONTEXT>"


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_the_chat_template_is_the_judge_s_chat(tmp_path, language):
    originals.build(tmp_path / "model", language)
    model, tokenizer = load(convert(tmp_path / "model"))
    content = [{"type": "image"}, {"type": "text", "text": "\n" + QUESTION}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    chat = chat.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * model.config.image_seq_length}</img>")
    assert tokenizer.encode(chat, add_special_tokens=False) == JudgeFormat(tokenizer, model.config).tokens(QUESTION)


def test_added_tokens_that_do_not_fit_are_refused(tmp_path):
    originals.build(tmp_path / "a", "internlm2", llm__vocab_size=100)
    with pytest.raises(OriginalError, match="token '</box>' is .*, but llm_config.vocab_size is 100"):
        Plan.of(tmp_path / "a")
    originals.build(tmp_path / "b", "internlm2")
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    last = max(settings["added_tokens_decoder"], key=int)
    del settings["added_tokens_decoder"][str(int(last) - 6)]
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(OriginalError, match="has no token <IMG_CONTEXT>; is this an InternVL?"):
        Plan.of(tmp_path / "b")
    (tmp_path / "b" / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": int(last)}))
    with pytest.raises(
        OriginalError, match=f"token {last} is '<IMG_CONTEXT>' in added_tokens.json, elsewhere '</box>'"
    ):
        Plan.of(tmp_path / "b")


# what is refused


def rewrite(folder: Path, change) -> None:
    """Change the weights of a checkpoint of one file."""
    file = next(folder.glob("*.safetensors"))
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mlp1.3.bias"), r"1 missing \(mlp1.3.bias\)"),
        (lambda w: w.update(extra=torch.ones(2)), r"1 unexpected \(extra\)"),
        (
            lambda w: w.update({"vision_model.encoder.layers.1.ls1": torch.ones(3)}),
            r"1 of another shape \(vision_model.encoder.layers.1.ls1 \[3\], not \[32\]\)",
        ),
        (
            lambda w: [w.pop(f"language_model.model.layers.0.feed_forward.w{n}.weight") for n in (1, 2, 3)],
            r"3 missing \(language_model.model.layers.0.feed_forward.w[123].weight, .*\)",
        ),
    ],
)
def test_every_key_is_accounted_for(tmp_path, change, message):
    originals.build(tmp_path / "model", "internlm2")
    rewrite(tmp_path / "model", change)
    with pytest.raises(OriginalError, match=f"does not fit its config.json: {message}"):
        Plan.of(tmp_path / "model")


def test_known_keys_without_use_are_left_out_and_named(tmp_path):
    originals.build(tmp_path / "model", "internlm2", select_layer=-2, llm__tie_word_embeddings=True)
    head, embeddings = "language_model.output.weight", "language_model.model.tok_embeddings.weight"
    frequencies = "language_model.model.layers.0.attention.rotary_emb.inv_freq"
    rewrite(tmp_path / "model", lambda w: w.update({head: w[embeddings].clone(), frequencies: torch.ones(8)}))
    plan = Plan.of(tmp_path / "model")
    blocks = {key for key in plan.tensors if key.startswith("vision_model.encoder.layers.2.")}
    assert plan.unused.keys() == {head, frequencies, *blocks} and len(blocks) == 13
    assert "left out: 13 tensors, behind the layer that select_layer takes" in plan.lines()
    rewrite(tmp_path / "model", lambda w: w[head].add_(1))
    with pytest.raises(
        OriginalError, match="output.weight differs from .* though llm_config.tie_word_embeddings is true"
    ):
        Plan.of(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "internvl"}, "model_type 'internvl' is not 'internvl_chat'"),
        ({"template": "Hermes-2"}, "template 'Hermes-2' is not 'internvl2_5'"),
        ({"ps_version": "v1"}, "ps_version 'v1' is not 'v2'"),
        ({"select_layer": -4}, "select_layer -4 is none of the 3 layers"),
        ({"force_image_size": 56}, "force_image_size 56 is not vision_config.image_size 28"),
        ({"downsample_ratio": 0.3}, "downsample_ratio 0.3 does not divide 4 patches"),
        ({"vision_config": None}, "vision_config is None"),
        ({"llm__architectures": ["Phi3ForCausalLM"]}, "llm_config.architectures 'Phi3ForCausalLM' is not InternLM2"),
        (
            {"llm__rope_scaling": {"type": "su", "factor": 2.0}},
            "llm_config.rope_scaling .*'su'.* is not a linear or dynamic one",
        ),
        ({"llm__rms_norm_eps": None}, "no llm_config.rms_norm_eps"),
        ({"vision__norm_type": "batch"}, "vision_config.norm_type 'batch'"),
        ({"vision__layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps 1e-05 with qk_normalization"),
    ],
)
def test_a_configuration_that_cannot_be_converted_names_its_field(tmp_path, changes, message):
    originals.build(tmp_path / "model", "internlm2")
    size = json.loads((tmp_path / "model" / "config.json").read_text())["llm_config"]["vocab_size"]
    raw = originals.config("internlm2", llm__vocab_size=size, **changes)
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(OriginalError, match=f"config.json: {message}"):
        Plan.of(tmp_path / "model")


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    originals.build(tmp_path / "model", "qwen2", kind="bin")
    torch.save({"mlp1.0.weight": Path("/")}, next((tmp_path / "model").glob("*.bin")))
    with pytest.raises(OriginalError, match="cannot be read as tensors: holds more than tensors"):
        Plan.of(tmp_path / "model")


# the command


def test_the_command_plans_then_converts_into_a_new_folder(tmp_path, capsys):
    originals.build(tmp_path / "model", "internlm2")
    arguments = ["--source", str(tmp_path / "model"), "--out", str(tmp_path / "new" / "judge")]
    assert main([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "InternLM2ForCausalLM -> llama, 2 layers of 64" in planned and "model.safetensors: " in planned
    assert not (tmp_path / "new").exists()
    assert main(arguments) == 0
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["judge"]
    assert load(tmp_path / "new" / "judge")[0].config.text_config.model_type == "llama"
    assert main(arguments) == 2 and "is there already; give a new folder" in capsys.readouterr().err
    assert main(["--source", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no config.json; give the folder of an InternVL checkpoint\n"


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path):
    originals.build(tmp_path / "model", "internlm2")
    plan = Plan.of(tmp_path / "model", shard_bytes=60_000)

    def stop_at_the_second(line: str) -> None:
        if line.startswith("2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan, tmp_path / "out", stop_at_the_second)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_vllm_reads_the_converted_folder(tmp_path, language):
    # vLLM without a GPU takes heads of a multiple of 32.
    originals.build(tmp_path / "model", language, llm__hidden_size=128, vision__hidden_size=64)
    out = convert(tmp_path / "model")
    image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    queries = [Query.about(QUESTION, image[:, :40]), Query.about(QUESTION, image)]
    expected = build_backend("transformers", out).answer(queries)
    backend = build_backend("vllm", out, kv_cache_memory_bytes=2**28)
    answers = backend.answer(queries)
    backend.close()
    assert [a.p_yes for a in answers] == pytest.approx([a.p_yes for a in expected], abs=1e-5)
    assert [a.mass for a in answers] == pytest.approx([a.mass for a in expected], abs=1e-5)
