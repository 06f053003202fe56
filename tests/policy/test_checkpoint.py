from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import JanusForConditionalGeneration

from rlpipe.paths import ROOT
from rlpipe.policy import original
from rlpipe.policy.checkpoint import CheckpointError, build_on_meta, export_original
from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.models import build_tokenizer

WIDTH, TOWER, LAYERS = 64, 48, 2


def published_names(layers: int, tower_layers: int) -> dict[str, tuple[int, ...] | None]:
    """Tensor names of the published checkpoints, module by module as the official code declares them.

    The value is None where the model has a use for the tensor, else the shape to give it.
    """
    names = ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    names += ["language_model.model.norm.weight", "gen_embed.weight", "gen_vision_model.quantize.embedding.weight"]
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    for i in range(layers):
        for module in (*projections, "input_layernorm", "post_attention_layernorm"):
            names.append(f"language_model.model.layers.{i}.{module}.weight")
    biased = ["aligner.layers.0", "aligner.layers.2", "gen_aligner.layers.0", "gen_aligner.layers.2"]
    biased += ["gen_head.output_mlp_projector", "gen_head.vision_head"]
    tower, vq = "vision_model.vision_tower", "gen_vision_model"
    biased += [f"{tower}.patch_embed.proj", f"{tower}.norm", f"{vq}.quant_conv", f"{vq}.post_quant_conv"]
    for i in range(tower_layers):
        for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            biased.append(f"{tower}.blocks.{i}.{module}")
    for half, blocks, shortcuts in (("encoder", 2, {(2, 0), (4, 0)}), ("decoder", 3, {(1, 0), (3, 0)})):
        residual = [f"mid.{i}" for i in (0, 2)]
        residual += [f"conv_blocks.{level}.res.{i}" for level in range(5) for i in range(blocks)]
        deepest = 4 if half == "encoder" else 0
        attention = ["mid.1", *(f"conv_blocks.{deepest}.attn.{i}" for i in range(blocks))]
        modules = [f"{r}.{m}" for r in residual for m in ("norm1", "conv1", "norm2", "conv2")]
        modules += [f"{a}.{m}" for a in attention for m in ("norm", "q", "k", "v", "proj_out")]
        modules += [f"conv_blocks.{level}.res.{i}.nin_shortcut" for level, i in shortcuts]
        sampler = "downsample" if half == "encoder" else "upsample"
        modules += [f"conv_blocks.{level}.{sampler}.conv" for level in range(4)]
        modules += ["conv_in", "norm_out", "conv_out"]
        biased += [f"{vq}.{half}.{module}" for module in modules]
    names += [f"{module}.{kind}" for module in biased for kind in ("weight", "bias")]
    names.append(f"{tower}.pos_embed")
    pool = {f"{tower}.attn_pool.latent": (1, 1, TOWER), f"{vq}.quantize.codebook_used": (512,)}
    for module in ("q", "proj", "norm", "mlp.fc2"):
        pool[f"{tower}.attn_pool.{module}.weight"] = pool[f"{tower}.attn_pool.{module}.bias"] = (TOWER,)
    pool[f"{tower}.attn_pool.kv.weight"] = (2 * TOWER, TOWER)
    return {**dict.fromkeys(names), **pool}


def small_config(vocab: int) -> dict:
    """The 7B's config.json with every width small; keys that the published file leaves to defaults are given."""
    config = json.loads((ROOT / "configs/models/janus_pro_7b.json").read_text("utf-8"))
    language = {"vocab_size": vocab, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    config["language_config"] |= {**language, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 5e3}
    for section in ("aligner_config", "gen_aligner_config", "gen_head_config"):
        config[section]["params"]["n_embed"] = WIDTH
    config["gen_head_config"]["params"] |= {"image_token_embed": WIDTH, "image_token_size": 128}
    config["gen_vision_config"]["params"] |= {"image_token_size": 128, "ch": 32, "z_channels": 32}
    tower = {"patch_size": 16, "width": TOWER, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
    config["vision_config"]["params"] |= {"model_name": "siglip_small", "image_size": 64, **tower}
    return config


@pytest.fixture(scope="module")
def original_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bfloat16 weights under the published names, in two `pytorch_model` files with an index."""
    path = tmp_path_factory.mktemp("original")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (path / "preprocessor_config.json").write_text('{"image_size": 64}', "utf-8")
    config = small_config(len(tokenizer))
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    shapes = shapes_of(config)
    generator = torch.Generator().manual_seed(0)
    names = published_names(LAYERS, 2)
    tensors = {
        name: (torch.randn(shape or shapes[name], generator=generator) * 0.05).bfloat16()
        for name, shape in names.items()
    }
    for name in tensors:
        if re.search(r"norm\w*\.weight$", name):
            tensors[name] = tensors[name] + 1.0
    first = dict(list(tensors.items())[:100])
    shards = {"pytorch_model-00001-of-00002.bin": first}
    shards["pytorch_model-00002-of-00002.bin"] = {k: v for k, v in tensors.items() if k not in first}
    for file, shard in shards.items():
        torch.save(shard, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    return path


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    janus = build_on_meta(original.transformers_config(config, {"bos": 1, "eos": 2, "pad": 0, "image": 5}))
    state = janus.state_dict()
    groups = original.grouped(state)
    return {key: original.original_shape(key, [state[n].shape for n in names]) for key, names in groups.items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read without the code under test."""
    tensors = {}
    for file in path.glob("pytorch_model*.bin"):
        tensors |= torch.load(file, weights_only=True)
    for file in path.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_the_names_of_a_7b_model_are_the_published_ones_and_none_more():
    config = json.loads((ROOT / "configs/models/janus_pro_7b.json").read_text("utf-8"))
    used = {name for name, shape in published_names(30, 24).items() if shape is None}
    assert set(shapes_of(config)) == used
    assert all(original.is_unused(name) for name, shape in published_names(30, 24).items() if shape is not None)
    assert not any(original.is_unused(name) for name in used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_original_checkpoint_comes_back_bit_for_bit(original_path, tmp_path, dtype):
    policy = JanusPolicy.load(original_path, dtype)
    policy.export(tmp_path / "out")
    assert same(tensors_of(original_path), tensors_of(tmp_path / "out"))
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((original_path / name).read_text())


def test_an_original_checkpoint_comes_back_by_way_of_the_transformers_layout(original_path, tmp_path):
    policy = JanusPolicy.load(original_path)
    policy.save(tmp_path / "mine")
    again = JanusPolicy.load(tmp_path / "mine")
    again.export(tmp_path / "out")
    assert same(tensors_of(original_path), tensors_of(tmp_path / "out"))
    plain = JanusForConditionalGeneration.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    assert same(dict(plain.state_dict()), dict(policy.janus.state_dict()))
    assert {n: b.tolist() for n, b in plain.named_buffers()} == {n: b.tolist() for n, b in again.janus.named_buffers()}


def test_a_model_made_here_exports_to_the_original_layout_and_comes_back(tiny_policy, tmp_path):
    tiny_policy.export(tmp_path / "out")
    again = JanusPolicy.load(tmp_path / "out")
    assert same(dict(tiny_policy.janus.state_dict()), dict(again.janus.state_dict()))
    images = torch.randint(0, 256, (2, 48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(tiny_policy.encode_pixels(images), again.encode_pixels(images))
    torch.testing.assert_close(tiny_policy.embed_pixels(images), again.embed_pixels(images), atol=1e-5, rtol=1e-5)


def test_an_export_in_several_files_has_an_index_that_loads(original_path, tmp_path):
    policy = JanusPolicy.load(original_path)
    export_original(tmp_path / "out", policy.janus, policy.templates, policy.original, shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert same(dict(JanusPolicy.load(tmp_path / "out").janus.state_dict()), dict(policy.janus.state_dict()))


def test_a_training_step_changes_what_it_trains_and_the_rest_exports_bit_for_bit(original_path, tmp_path):
    policy = JanusPolicy.load(original_path)
    policy.set_trainable(["language_model"])
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.tensor([policy.templates.prompt("a red circle")])
    hidden = policy.hidden(policy.embed_text(ids), torch.arange(ids.shape[1])[None])
    F.cross_entropy(policy.text_logits(hidden)[0, :-1], ids[0, 1:]).backward()
    optimizer.step()
    policy.export(tmp_path / "out")
    before, after = tensors_of(original_path), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("language_model.model.")}


def test_the_vision_towers_fused_attention_is_split_into_queries_keys_and_values(original_path):
    janus = JanusPolicy.load(original_path).janus
    fused = tensors_of(original_path)["vision_model.vision_tower.blocks.1.attn.qkv.weight"].float()
    attention = janus.model.vision_model.encoder.layers[1].self_attn
    for part, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(projection.weight, fused.view(3, TOWER, TOWER)[part])


def test_the_configuration_follows_the_file(original_path):
    config = JanusPolicy.load(original_path).janus.config
    assert config.text_config.rope_parameters["rope_theta"] == 5e3
    assert not config.tie_word_embeddings and config.vq_config.num_patches == 4
    tokenizer = Tokenizer.from_file(str(original_path / "tokenizer.json"))
    assert config.image_token_id == tokenizer.token_to_id("<image_placeholder>")
    assert config.text_config.pad_token_id == tokenizer.token_to_id("<｜▁pad▁｜>")


def test_a_silent_config_does_not_tie_the_head(tiny_policy, tiny_policy_path, tmp_path):
    path = shutil.copytree(tiny_policy_path, tmp_path / "silent")
    config = json.loads((path / "config.json").read_text("utf-8"))
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = JanusPolicy.load(path)
    assert torch.equal(loaded.janus.lm_head.weight, tiny_policy.janus.lm_head.weight)


def test_a_byte_level_tokenizer_under_a_llama_class_name_keeps_its_own_rules(original_path):
    raw = Tokenizer.from_file(str(original_path / "tokenizer.json"))
    text = "<|User|>: two red circles\n\n<|Assistant|>:"
    expected = raw.encode(text, add_special_tokens=False).ids
    assert JanusPolicy.load(original_path).templates.tokenizer.encode(text, add_special_tokens=False) == expected


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("wrapped", [None, "ema", "module"])
def test_an_overlay_replaces_its_tensors_and_no_other(original_path, tmp_path, layout, wrapped):
    names = {"original": "language_model.lm_head.weight", "transformers": "lm_head.weight"}
    qkv = "vision_model.vision_tower.blocks.0.attn.qkv.bias"
    base = JanusPolicy.load(original_path).janus.state_dict()
    overlay = {names[layout]: torch.full_like(base["lm_head.weight"], 0.5)}
    if layout == "original":
        overlay[qkv] = torch.arange(3 * TOWER).float()
    torch.save({wrapped: overlay} if wrapped else overlay, tmp_path / "iter_1.pth")
    policy = JanusPolicy.load(original_path, overlay=tmp_path / "iter_1.pth")
    changed = {n for n, t in policy.janus.state_dict().items() if not torch.equal(t, base[n])}
    attention = {f"model.vision_model.encoder.layers.0.self_attn.{p}_proj.bias" for p in "qkv"}
    assert changed == {"lm_head.weight", *(attention if layout == "original" else ())}
    policy.export(tmp_path / "out")
    assert tensors_of(tmp_path / "out")[names["original"]].unique().tolist() == [0.5]


def test_a_key_that_fits_nothing_and_one_of_another_shape_are_named(original_path, tmp_path):
    overlay = {"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2), "gen_embed.weight": torch.zeros(3)}
    save_file(overlay, tmp_path / "overlay.safetensors")
    with pytest.raises(CheckpointError) as raised:
        JanusPolicy.load(original_path, overlay=tmp_path / "overlay.safetensors")
    message = str(raised.value)
    assert message.startswith("policy.overlay") and "\n" not in message
    assert "1 unexpected (language_model.model.layers.9.mlp.up_proj.weight)" in message
    assert "1 of another shape (gen_embed.weight [3], not [128, 8])" in message


def test_missing_tensors_are_counted_and_named(original_path, tmp_path):
    path = shutil.copytree(original_path, tmp_path / "cut")
    shard = path / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    del state["language_model.lm_head.weight"], state["gen_embed.weight"]
    torch.save(state, shard)
    with pytest.raises(CheckpointError, match=r"2 missing \(model\.generation_embeddings\.weight, lm_head\.weight\)"):
        JanusPolicy.load(path)


def test_a_missing_shard_is_named(original_path, tmp_path):
    path = shutil.copytree(original_path, tmp_path / "cut")
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        JanusPolicy.load(path)


def test_a_pickle_with_code_in_it_is_refused(original_path, tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"policy\.overlay: .*evil\.pth cannot be read as tensors"):
        JanusPolicy.load(original_path, overlay=tmp_path / "evil.pth")


def test_another_kind_of_model_is_named(tmp_path, tiny_policy_path):
    path = shutil.copytree(tiny_policy_path, tmp_path / "llama")
    (path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    with pytest.raises(CheckpointError, match=r"model_type 'llama'; give a Janus checkpoint"):
        JanusPolicy.load(path)


def test_a_config_of_unequal_widths_is_refused(original_path, tmp_path):
    path = shutil.copytree(original_path, tmp_path / "odd")
    config = json.loads((path / "config.json").read_text("utf-8"))
    config["aligner_config"]["params"]["n_embed"] = 32
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match=r"differ in width: \[32, 64\]"):
        JanusPolicy.load(path)


@pytest.mark.slow
def test_the_export_command_merges_an_overlay_and_changes_the_layout(original_path, tmp_path):
    save_file({"lm_head.weight": torch.zeros(shapes_of_head(original_path))}, tmp_path / "overlay.safetensors")
    command = [sys.executable, "launch/export.py", "--policy", original_path, "--out", tmp_path / "out"]
    options = ["--overlay", tmp_path / "overlay.safetensors", "--layout", "transformers"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = JanusPolicy.load(tmp_path / "out", torch.bfloat16).janus.state_dict()
    assert state["lm_head.weight"].abs().max() == 0
    assert torch.equal(state["model.generation_embeddings.weight"], tensors_of(original_path)["gen_embed.weight"])
    wrong = subprocess.run([*command[:3], tmp_path, *command[4:]], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("policy.path: no config.json")


def shapes_of_head(path: Path) -> torch.Size:
    return tensors_of(path)["language_model.lm_head.weight"].shape
