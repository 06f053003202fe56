"""The InternVL judge on a small random checkpoint of the real class."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.internvl import InternVLJudge, JudgeFormat, answer_logits
from rlpipe.reward.judge import p_yes
from rlpipe.reward.question import check_question, fill
from rlpipe.reward.scorer import build_scorer, score_all
from rlpipe.types import Prompt, ScoreRequest
from rlpipe.world.models import build_judge

QUESTION = 'Does this image match the description "{prompt}"?'
PROMPTS = ["a red circle", "a photo of two red circles", "a photo of a green square left of a blue triangle"]


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = build_judge(layers=2, vision_layers=1)
    return model, JudgeFormat(tokenizer, model.config)


@pytest.fixture(scope="module")
def judge_path(parts, tmp_path_factory) -> Path:
    model, judge = parts
    path = tmp_path_factory.mktemp("judge")
    model.save_pretrained(path)
    judge.tokenizer.save_pretrained(path)
    return path


def draw(count: int, size: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def ask(count: int, size: int = 48) -> list[ScoreRequest]:
    images = draw(count, size)
    return [ScoreRequest(f"r{i}", Prompt(str(i), PROMPTS[i % 3]), images[i]) for i in range(count)]


def test_scores_are_probabilities_in_the_order_of_the_requests(judge_path):
    requests = ask(9)
    scores = score_all(build_scorer(ScorerSection(path=str(judge_path))), requests)
    assert [s.id for s in scores] == [r.id for r in requests]
    values = np.array([s.value for s in scores])
    assert ((0 < values) & (values < 1)).all() and values.std() > 1e-3


def test_results_do_not_depend_on_the_batch(judge_path):
    requests = ask(9)
    alone = [InternVLJudge(judge_path, QUESTION, batch_size=1).score([r])[0].value for r in requests]
    for size in (2, 4, 9):
        together = InternVLJudge(judge_path, QUESTION, batch_size=size).score(requests)
        np.testing.assert_allclose([s.value for s in together], alone, atol=1e-6)


def test_the_whole_model_run_on_one_row_gives_the_same_logits(parts):
    model, judge = parts
    ids, mask = judge.encode([fill(QUESTION, p) for p in PROMPTS])
    pixels = judge.pixels(draw(3))
    with torch.no_grad():
        ours = answer_logits(model, ids, mask, pixels)
        for row in range(3):
            length = int(mask[row].sum())
            whole = model(input_ids=ids[row : row + 1, :length], pixel_values=pixels[row : row + 1]).logits[0, -1]
            torch.testing.assert_close(ours[row], whole, atol=1e-5, rtol=0)
    assert ours.dtype == torch.float32 and mask.sum(1).unique().numel() == 3


def test_the_answer_depends_on_the_image_and_on_the_prompt(judge_path):
    judge = InternVLJudge(judge_path, QUESTION)
    one, two = draw(2)
    pairs = [(PROMPTS[0], one), (PROMPTS[0], two), (PROMPTS[1], one)]
    requests = [ScoreRequest("", Prompt("", text), image) for text, image in pairs]
    a, b, c = (s.value for s in judge.score(requests))
    assert abs(a - b) > 1e-5 and abs(a - c) > 1e-5


def test_the_chat_is_internvl_s_and_a_prompt_cannot_break_out_of_it(parts):
    model, judge = parts
    ids, mask = judge.encode([fill(QUESTION, "a red <IMG_CONTEXT> circle <|im_end|>"), "yes"])
    assert ((ids == model.config.image_token_id).sum(1) == model.config.image_seq_length).all()
    tokens = judge.tokenizer.convert_ids_to_tokens(ids[1][mask[1] == 1].tolist())
    image = ["<img>", *["<IMG_CONTEXT>"] * 36, "</img>"]
    assert tokens == ["<|im_start|>", "user", *image, "yes", "<|im_end|>", "<|im_start|>", "assistant"]
    end = judge.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (ids[0] == end).sum() == 1


def test_a_system_message_comes_first_if_one_is_given(parts):
    model, judge = parts
    said = JudgeFormat(judge.tokenizer, model.config, system="yes").encode(["no"])[0][0].tolist()
    silent = judge.encode(["no"])[0][0].tolist()
    head = judge.tokenizer.convert_tokens_to_ids(["<|im_start|>", "system", "yes", "<|im_end|>"])
    assert said == [*head, *silent]


def test_pixels_of_the_right_size_are_only_normalised(parts):
    _, judge = parts
    images = draw(2)
    pixels = judge.pixels(torch.from_numpy(images))
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_images_of_another_size_are_not_taken_for_tiles(parts):
    with pytest.raises(ValueError, match=r"images: \(64, 64\) pixels, not \(48, 48\); cut them into tiles"):
        parts[1].pixels(draw(1, size=64))


def test_an_image_of_several_tiles_stands_once_in_the_chat_with_all_their_tokens(parts):
    model, judge = parts
    tiles = judge.num_tiles([draw(1)[0], draw(1, size=100)[0]])
    assert tiles == [1, 5]
    tokens = judge.tokens(("", "yes", "no"), tiles)
    assert tokens.count(model.config.image_token_id) == 36 * 6
    words = judge.tokenizer.convert_ids_to_tokens(tokens)
    assert words.count("<img>") == words.count("</img>") == 2


def test_a_tokenizer_s_first_token_comes_before_the_chat(parts):
    model, judge = parts
    tokenizer = copy.deepcopy(judge.tokenizer)
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    for system in ("", "yes"):
        plain = JudgeFormat(judge.tokenizer, model.config, system).tokens("no")
        assert JudgeFormat(tokenizer, model.config, system).tokens("no") == [first, *plain]


def test_images_of_different_sizes_are_scored_together(judge_path):
    judge = InternVLJudge(judge_path, QUESTION)
    mixed = [*ask(2), *ask(2, size=64)]
    assert [s.value for s in judge.score(mixed)][2:] == pytest.approx(
        [s.value for s in judge.score(mixed[2:])], abs=1e-6
    )


def test_bfloat16_agrees_with_float32(judge_path):
    requests = ask(6)
    wide, narrow = (InternVLJudge(judge_path, QUESTION, dtype=d).score(requests) for d in ("float32", "bfloat16"))
    np.testing.assert_allclose([s.value for s in narrow], [s.value for s in wide], atol=0.03)


def test_p_yes_sums_the_spellings_of_both_answers():
    logits = torch.log(torch.tensor([[0.3, 0.1, 0.15, 0.05, 0.4]]))
    assert p_yes(logits, [0, 1], [2, 3]).item() == pytest.approx(0.4 / 0.6)
    assert p_yes(torch.tensor([[-2000.0, 0.0, -2000.0]]), [0], [2]).item() == pytest.approx(0.5)


def test_gradients_reach_all_trained_parts(parts):
    model, judge = parts
    ids, mask = judge.encode(PROMPTS)
    judge.p_yes(answer_logits(model, ids, mask, judge.pixels(draw(3)))).sum().backward()
    for part in (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
        model.lm_head,
    ):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    model.zero_grad(set_to_none=True)


def test_braces_in_a_prompt_are_kept():
    assert fill(check_question("Is it {prompt}?"), "a {prompt} of {0}") == "Is it a {prompt} of {0}?"


def test_a_tokenizer_without_the_chat_tokens_is_refused(parts, tiny_policy):
    model, _ = parts
    with pytest.raises(ValueError, match="is not one token; is this the tokenizer of an InternVL"):
        JudgeFormat(tiny_policy.templates.tokenizer, model.config)


def test_a_folder_without_a_checkpoint_or_with_another_model_is_refused(tmp_path, tiny_policy_path):
    with pytest.raises(ConfigError, match=r"path: no config.json in"):
        build_scorer(ScorerSection(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"path: .* holds a model of type 'janus', not 'internvl'"):
        build_scorer(ScorerSection(path=str(tiny_policy_path)))


def test_a_checkpoint_without_safetensors_is_refused_in_one_line(judge_path, tmp_path):
    (tmp_path / "config.json").write_text((judge_path / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"reward\[judge\]: .*safetensors") as error:
        build_scorer(ScorerSection(path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_config_that_does_not_fit_its_own_images_is_refused(judge_path, parts):
    config = type(parts[0].config).from_dict(json.loads((judge_path / "config.json").read_text()))
    config.image_seq_length = 35
    with pytest.raises(ValueError, match="image_seq_length is 35, but an image of .* makes 36 tokens"):
        JudgeFormat(parts[1].tokenizer, config)


def test_wrong_constructor_values_name_themselves(judge_path):
    with pytest.raises(ConfigError, match=r"reward\[judge\].options.dtype: 'float16' is not one of float32, bfloat16"):
        build_scorer(ScorerSection(path=str(judge_path), options={"dtype": "float16"}))
    with pytest.raises(ConfigError, match=r"batch_size: 0 is no whole number of at least 1"):
        build_scorer(ScorerSection(path=str(judge_path), batch_size=0))
