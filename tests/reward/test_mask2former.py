"""Mask2Former and CLIP behind the detector interface, on tiny random checkpoints of the real classes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
)
from transformers.models.mask2former import modeling_mask2former

from rlpipe.config import ScorerSection
from rlpipe.reward.geneval import COLORS
from rlpipe.reward.mask2former import (
    COLOR_TEMPLATES,
    LABELS,
    ColorNamer,
    Mask2FormerDetector,
    box_of,
    fitted,
    instances,
)
from rlpipe.reward.scorer import build_scorer, score_all
from rlpipe.types import Prompt, ScoreRequest

EDGES = (64, 96)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as it is published, the buffer of its loss included, and the model that it is of."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        num_labels=len(LABELS),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # Only the loss needs scipy.
        model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)  # Random weights would find every class alike.
    path = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    torch.manual_seed(0)
    words = sorted({w for t in COLOR_TEMPLATES for w in t.format(color=" ".join(COLORS), label="x").split()} | {"-"})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<start>", "<end>", *words, "colored"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**small, **text}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", unk_token="<unk>").save_pretrained(path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)
    return path


def noise(*sizes: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_the_logits_are_those_of_the_published_class(published):
    path, model = published
    detector = Mask2FormerDetector(path, device="cpu", edges=EDGES)
    pixels, _ = detector._pixels(np.stack(noise((48, 48), (48, 48))))
    with torch.no_grad():
        classes, masks = detector.model(pixels)
        theirs = model(pixel_values=pixels)
    torch.testing.assert_close(classes, theirs.class_queries_logits)
    torch.testing.assert_close(masks, theirs.masks_queries_logits)
    assert masks.std() > 0


def test_detections_do_not_depend_on_the_batch(published):
    images = noise((48, 48), (40, 60), (48, 48), (60, 40), (48, 48))
    colored = [set()] * len(images)
    alone = Mask2FormerDetector(published[0], micro_batch=1, device="cpu", least_score=0.0, edges=EDGES)
    together = Mask2FormerDetector(published[0], micro_batch=3, device="cpu", least_score=0.0, edges=EDGES)
    for image, ours, theirs in zip(
        images, alone.detect(images, colored), together.detect(images, colored), strict=True
    ):
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert (a.label, a.box, a.color) == (b.label, b.box, None)
            assert a.score == pytest.approx(b.score, abs=1e-4)
            assert 0 <= a.box[0] < a.box[2] <= image.shape[1] and 0 <= a.box[1] < a.box[3] <= image.shape[0]
        assert [d.score for d in ours] == sorted((d.score for d in ours), reverse=True)


def test_the_input_keeps_its_proportions_and_is_padded_behind_the_image(published):
    assert fitted(384, 384) == (800, 800)
    assert fitted(384, 1000) == (512, 1333)
    assert fitted(480, 640) == (800, 1067)
    detector = Mask2FormerDetector(published[0], device="cpu", edges=EDGES)
    white = np.full((1, 40, 60, 3), 255, np.uint8)
    pixels, inner = detector._pixels(white)
    assert inner == (64, 96) and pixels.shape == (1, 3, 64, 96)
    pixels, inner = detector._pixels(np.full((1, 40, 50, 3), 255, np.uint8))
    assert inner == (64, 80) and pixels.shape == (1, 3, 64, 96)
    expected = (1 - torch.tensor(detector.mean)) / torch.tensor(detector.std)
    torch.testing.assert_close(pixels[0, :, 10, 79], expected)
    assert (pixels[..., 80:] == 0).all()


def test_instances_are_the_best_pairs_of_query_and_class_with_their_masks_mean_probability():
    classes = torch.full((3, 4), -20.0)  # 3 queries, 3 classes and "nothing"
    classes[0, 0], classes[0, 1] = 2.0, 2.0  # one query, two classes
    classes[1, 2] = 5.0
    classes[2, 3] = 5.0  # nothing
    masks = torch.full((3, 4, 4), -3.0)
    masks[0, :2, :2] = 3.0
    masks[1, 2:, 1:3] = 1.0
    labels, scores, binary = instances(classes, masks, (4, 4), (4, 4), (4, 4), 0.3)
    assert labels.tolist()[0] == 2 and sorted(labels.tolist()[1:]) == [0, 1]
    sure, unsure = torch.tensor(1.0).sigmoid(), torch.tensor(3.0).sigmoid() / 2
    torch.testing.assert_close(scores, torch.stack([sure, unsure, unsure]), atol=1e-4, rtol=0)
    assert [box_of(mask.numpy()) for mask in binary] == [(1, 2, 3, 4), (0, 0, 2, 2), (0, 0, 2, 2)]
    assert len(instances(classes, masks, (4, 4), (4, 4), (4, 4), 0.5)[0]) == 1


def test_masks_are_cut_from_the_padding_before_they_get_the_images_size():
    classes, masks = torch.tensor([[9.0, 0.0]]), torch.full((1, 8, 8), -5.0)
    masks[0, :4, :2] = 5.0  # the left half of what is image: 4 x 4 of 8 x 8
    _, _, binary = instances(classes, masks, (32, 32), (16, 16), (40, 40), 0.3)
    x1, y1, x2, y2 = box_of(binary[0].numpy())
    assert (x1, y1) == (0, 0) and abs(x2 - 20) <= 2 and y2 == 40


def test_the_color_is_that_of_the_object_and_not_of_what_is_around_it(clip_path):
    namer = ColorNamer(clip_path)
    (inside, around, other) = noise((40, 40), (40, 40), (40, 40))
    mask = np.zeros((40, 40), bool)
    mask[5:30, 8:36] = True
    box = box_of(mask)
    first, second = (np.where(mask[..., None], inside, background) for background in (around, other))
    assert namer.color(first, mask, box, "bench") == namer.color(second, mask, box, "bench")
    pixels = namer.processor(Image.fromarray(inside[5:30, 8:36]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        image = namer.model.get_image_features(pixel_values=pixels).pooler_output[0]
        means = []
        for color in COLORS:
            rows = []
            for template in COLOR_TEMPLATES:
                ids = namer.tokenizer(template.format(color=color, label="bench"), return_tensors="pt")["input_ids"]
                text = namer.model.get_text_features(input_ids=ids).pooler_output[0]
                rows.append(text / text.norm())
            mean = torch.stack(rows).mean(0)
            means.append(mean / mean.norm() @ image)
    assert namer.color(first, mask, box, "bench") == COLORS[int(torch.stack(means).argmax())]


def test_the_scorer_asks_for_colors_of_the_classes_that_a_prompt_colors(published, clip_path):
    section = ScorerSection(
        scorer="detector",
        path=str(published[0]),
        options={"clip": str(clip_path), "thresholds": {"score": 0.0, "counting": 0.0}},
    )
    scorer = build_scorer(section, device="cpu")
    scorer.detector.edges = EDGES
    (image,) = noise((48, 48))
    found = scorer.detector.detect([image], [set(LABELS)])[0]
    assert {d.color for d in found} <= set(COLORS)
    best = found[0]
    prompts = [
        Prompt("right", "", {"tag": "colors", "include": [{"class": best.label, "count": 1, "color": best.color}]}),
        Prompt("wrong", "", {"tag": "colors", "include": [{"class": best.label, "count": 1, "color": "mauve"}]}),
        Prompt("plain", "", {"tag": "single_object", "include": [{"class": best.label, "count": 1}]}),
    ]
    assert [line.partition(":")[0] for line in scorer.check(prompts)] == ["prompt 'wrong'"]
    scores = score_all(scorer, [ScoreRequest(p.id, p, image) for p in prompts])
    assert [score.value for score in scores] == [1.0, None, 1.0]


def test_without_clip_prompts_with_colors_are_named(published):
    section = ScorerSection(scorer="detector", path=str(published[0]))
    prompt = Prompt("p", "a red dog", {"include": [{"class": "dog", "count": 1, "color": "red"}]})
    (problem,) = build_scorer(section, device="cpu").check([prompt])
    assert "the detector names no colours" in problem


def test_a_checkpoint_with_other_classes_or_without_weights_is_refused(published, tmp_path):
    path, _ = published
    weights = load_file(path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    save_file({k: v for k, v in weights.items() if not k.startswith("class_predictor")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="path: .* has no weights for class_predictor"):
        Mask2FormerDetector(tmp_path, device="cpu")
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = dict(list(config["id2label"].items())[:3])
    config["label2id"] = {v: int(k) for k, v in config["id2label"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="path: .* has 3 classes, not the 80 of COCO"):
        Mask2FormerDetector(tmp_path, device="cpu")
