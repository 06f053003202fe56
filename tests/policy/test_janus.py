from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlpipe.policy.janus import JanusPolicy


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8))


def test_a_saved_policy_loads_to_the_same_model(tiny_policy, tiny_policy_path):
    loaded = JanusPolicy.load(tiny_policy_path)
    for name, tensor in tiny_policy.janus.state_dict().items():
        assert torch.equal(loaded.janus.state_dict()[name], tensor), name
    caption = "a photo of two red circles"
    assert loaded.templates.prompt(caption) == tiny_policy.templates.prompt(caption)


def test_codes_are_those_nearest_by_cosine_and_survive_a_rescaled_codebook(tiny_policy, tiny_policy_path, tmp_path):
    images = random_images(4)
    vq = tiny_policy.janus.model.vqmodel
    pixels = F.pixel_unshuffle(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 8)
    with torch.no_grad():
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1).permute(0, 2, 3, 1).reshape(-1, 9)
        distances = torch.cdist(latents, F.normalize(vq.quantize.embedding.weight, dim=-1))
    codes = tiny_policy.encode_pixels(images)
    assert torch.equal(codes.flatten(), distances.argmin(-1))
    scaled = JanusPolicy.load(shutil.copytree(tiny_policy_path, tmp_path / "scaled"))
    with torch.no_grad():
        scaled.janus.model.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.1, 5.0, 512)[:, None])
    scaled.save(tmp_path / "scaled")
    assert torch.equal(JanusPolicy.load(tmp_path / "scaled").encode_pixels(images), codes)


def test_decoded_pixels_are_truncated_to_uint8(tiny_policy):
    codes = torch.randint(0, 512, (2, 36), generator=torch.Generator().manual_seed(0))
    raw = F.pixel_shuffle(tiny_policy.janus.model.vqmodel.decode(codes), 8).clamp(-1, 1)
    expected = np.floor((raw.detach().numpy() + 1) / 2 * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.array_equal(tiny_policy.decode_codes(codes).numpy(), expected)


def test_a_gap_in_the_positions_is_no_border_between_sequences(tiny_policy):
    torch.manual_seed(0)
    embeddings = torch.randn(1, 6, 64)
    gap = torch.tensor([[0, 1, 2, 7, 8, 9]])
    changed = embeddings.clone()
    changed[:, 0] += 1.0
    with torch.no_grad():
        before, after = (tiny_policy.hidden(e, gap)[:, -1] for e in (embeddings, changed))
    assert (before - after).abs().max() > 1e-4


def test_padding_on_the_right_changes_nothing(tiny_policy):
    torch.manual_seed(0)
    embeddings = torch.randn(2, 8, 64)
    positions = torch.arange(8).expand(2, -1)
    with torch.no_grad():
        alone = tiny_policy.hidden(embeddings[:, :5], positions[:, :5])
        padded = tiny_policy.hidden(embeddings, positions)[:, :5]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def test_only_the_named_parts_receive_gradients(tiny_policy_path):
    policy = JanusPolicy.load(tiny_policy_path)
    policy.set_trainable(["aligner", "lm_head"])
    trained = {name for name, parameter in policy.janus.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("model.aligner", "lm_head")) for name in trained)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy\.path: no config\.json"):
        JanusPolicy.load(tmp_path)


def test_the_prompt_is_framed_as_the_official_template_and_blanked_but_for_its_ends(tiny_policy):
    templates = tiny_policy.templates
    ids = templates.prompt("  a photo of two red circles ")
    words = templates.tokenizer.convert_ids_to_tokens(ids)
    assert words[1:3] == ["<|User|>", ":"] and words[-3:] == ["<|Assistant|>", ":", "<begin_of_image>"]
    assert words[3:-3] == ["a", "photo", "of", "two", "red", "circles"]
    blank = templates.blank(ids)
    assert (blank[0], blank[-1]) == (templates.bos, templates.boi) and set(blank[1:-1]) == {templates.pad}


def test_words_of_a_reflection_come_back_without_special_tokens(tiny_policy):
    answer = "No, there is one red circle, not two."
    assert tiny_policy.templates.text(tiny_policy.templates.reflection(answer)) == answer
