"""GenEval's detector from transformers' models: Mask2Former finds objects, CLIP names their colours.

The official evaluator runs mmdet's Mask2Former, whose weights are of another training: scores here are not official
GenEval numbers, and the counting threshold of 0.9 was calibrated for the other weights. Everything after the weights
follows the official pipeline: the size of the input, the best pairs of query and class, masks that may overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerModel,
    PreTrainedModel,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from rlpipe.paths import resolve_path
from rlpipe.reward.geneval import COLORS, Detection, Thresholds

_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
LABELS = tuple(name.strip() for name in _NAMES.split(","))
"""GenEval's names of the 80 COCO classes, in COCO's order: a class is known by its index, never by its name."""
COLOR_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKDROP = (0x99, 0x99, 0x99)
"""Put in place of all that is not the object whose colour is asked."""
STRIDE = 32
SHORT_EDGE, LONG_EDGE = 800, 1333


class Segmenter(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its loss, which would make scipy a requirement."""

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of classes [B, Q, C + 1], the last being "nothing", and of masks [B, Q, H / 4, W / 4]."""
        outputs = self.model(pixel_values=pixel_values, output_hidden_states=True)
        last = outputs.transformer_decoder_intermediate_states[-1]
        return self.class_predictor(last.transpose(0, 1)), outputs.masks_queries_logits[-1]


class Mask2FormerDetector:
    """Objects of the 80 COCO classes, and their colours among GenEval's ten.

    path: folder of a Mask2Former for COCO instances (facebook/mask2former-swin-small-coco-instance), safetensors.
    clip: folder of a CLIP (openai/clip-vit-large-patch14); None leaves colours unnamed.
    micro_batch: images of one size in a forward pass. edges: shorter edge that an image gets, and longest that the
    longer one may get, in pixels.

        detector = Mask2FormerDetector("/models/mask2former", "/models/clip")
        detector.detect([image], [{"bench"}])[0]        # [Detection("bench", 0.98, (12., 80., 301., 290.), "red")]
    """

    labels = LABELS
    thresholds = Thresholds()

    def __init__(
        self,
        path: str | Path,
        clip: str | Path | None = None,
        micro_batch: int = 8,
        device: str = "auto",
        least_score: float = Thresholds().score,
        edges: tuple[int, int] = (SHORT_EDGE, LONG_EDGE),
    ) -> None:
        folder = _folder(path, "mask2former", "path")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.micro_batch, self.least_score, self.edges = micro_batch, least_score, edges
        num_labels = Mask2FormerConfig.from_pretrained(folder).num_labels
        if num_labels != len(self.labels):
            raise ValueError(
                f"path: {folder} has {num_labels} classes, not the {len(self.labels)} of COCO instances; give a "
                "checkpoint for these"
            )
        # float32 throughout: boxes and scores near a threshold should not depend on rounding.
        self.model = _load(Segmenter, folder, "path").to(self.device)
        self.mean, self.std = _normalisation(folder)
        self.namer = None if clip is None else ColorNamer(clip, self.device)
        self.colors = () if clip is None else COLORS

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray], colored: Sequence[Collection[str]]) -> list[list[Detection]]:
        """All objects with a score above `least_score` of each uint8 image [H, W, 3], best first.

        colored: per image the classes whose objects get a colour.
        """
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        for members in by_size.values():
            for start in range(0, len(members), self.micro_batch):
                part = members[start : start + self.micro_batch]
                pixels, inner = self._pixels(np.stack([images[i] for i in part]))
                classes, masks = self.model(pixels)
                for i, row_classes, row_masks in zip(part, classes, masks, strict=True):
                    found[i] = self._objects(images[i], row_classes, row_masks, pixels.shape[-2:], inner, colored[i])
        return found

    def _pixels(self, images: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """float32 [B, 3, h, w] of uint8 [B, H, W, 3], and how much of h and w is image and not padding."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        inner = fitted(images.shape[1], images.shape[2], *self.edges)
        pixels = F.interpolate(pixels, size=inner, mode="bilinear", align_corners=False) / 255
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        height, width = (-(-side // STRIDE) * STRIDE for side in inner)
        return F.pad((pixels - mean) / std, (0, width - inner[1], 0, height - inner[0])), inner

    def _objects(
        self,
        image: np.ndarray,
        classes: torch.Tensor,
        masks: torch.Tensor,
        padded: tuple[int, int],
        inner: tuple[int, int],
        colored: Collection[str],
    ) -> list[Detection]:
        labels, scores, binary = instances(classes, masks, padded, inner, image.shape[:2], self.least_score)
        objects = []
        for label, score, mask in zip(labels.tolist(), scores.tolist(), binary.cpu().numpy(), strict=True):
            name, box = self.labels[label], box_of(mask)
            color = self.namer.color(image, mask, box, name) if self.namer and name in colored else None
            objects.append(Detection(name, score, tuple(map(float, box)), color))
        return objects


class ColorNamer:
    """Names the colour of an object: CLIP compares its cut-out with sentences about each colour (official)."""

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        folder = _folder(path, "clip", "clip")
        self.device = device
        self.model = _load(CLIPModel, folder, "clip").to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._sentences: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def color(self, image: np.ndarray, mask: np.ndarray, box: tuple[int, int, int, int], label: str) -> str:
        """The likeliest of COLORS for the pixels of a bool mask [H, W] in a uint8 image [H, W, 3]."""
        x1, y1, x2, y2 = box
        cut = np.where(mask[..., None], image, np.uint8(BACKDROP))[y1:y2, x1:x2]
        pixels = self.processor(Image.fromarray(cut), return_tensors="pt")["pixel_values"].to(self.device)
        embedding = self.model.get_image_features(pixel_values=pixels).pooler_output[0]
        return COLORS[int((self._of(label) @ embedding).argmax())]

    def _of(self, label: str) -> torch.Tensor:
        """Unit embeddings [colours, D] of what is said of each colour of a class."""
        if label not in self._sentences:
            texts = [t.format(color=color, label=label) for color in COLORS for t in COLOR_TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            each = F.normalize(features, dim=-1).view(len(COLORS), len(COLOR_TEMPLATES), -1)
            self._sentences[label] = F.normalize(each.mean(1), dim=-1)
        return self._sentences[label]


def fitted(height: int, width: int, short: int = SHORT_EDGE, long: int = LONG_EDGE) -> tuple[int, int]:
    """The size with the same proportions whose shorter edge is `short`, unless the longer one would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)


def instances(
    classes: torch.Tensor,
    masks: torch.Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    least_score: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class indices int64 [N], scores float32 [N] and masks bool [N, H, W] of one image's objects, best first.

    classes: logits [Q, C + 1], the last being "nothing". masks: logits [Q, h, w]. padded: size of the model's input;
    inner: how much of it is image; size: of the image itself.

    Of all pairs of query and class, the Q best; so that one query can stand for several classes. The score is the
    pair's probability times the mean probability of the mask inside itself. The mask becomes binary after it has been
    brought to the image's size.
    """
    num_queries, num_classes = classes.shape[0], classes.shape[1] - 1
    best = classes.softmax(-1)[:, :-1].flatten().topk(num_queries)
    kept = best.values > least_score  # The mask can only lower it.
    probabilities, pairs = best.values[kept], best.indices[kept]
    if len(pairs) == 0:
        return pairs, probabilities, masks.new_zeros((0, *size), dtype=torch.bool)
    logits = masks[pairs // num_classes][None].float()
    logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    binary = logits > 0
    inside = (logits.sigmoid() * binary).sum((1, 2)) / (binary.sum((1, 2)) + 1e-6)
    scores = probabilities * inside
    order = scores.argsort(descending=True)
    order = order[scores[order] > least_score]
    return (pairs % num_classes)[order], scores[order], binary[order]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around the true pixels of a mask [H, W], x2 and y2 excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def check_folders(path: str | Path, clip: str | Path | None) -> None:
    """ValueError if one of the folders is no checkpoint of its kind; nothing is loaded."""
    try:
        _folder(path, "mask2former", "path")
        if clip is not None:
            _folder(clip, "clip", "clip")
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def _folder(path: str | Path, kind: str, field: str) -> Path:
    folder = resolve_path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{field}: no config.json in {folder}; give the folder of a {kind} checkpoint")
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != kind:
        raise ValueError(f"{field}: {folder} holds a model of type {found!r}, not {kind!r}; give the folder of one")
    return folder


def _load(kind: type[PreTrainedModel], folder: Path, field: str) -> PreTrainedModel:
    """A model in evaluation mode, float32; ValueError where the folder lacks some of its weights."""
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{field}: {folder} has no weights for {min(info['missing_keys'])}; is it complete?")
    return model.eval()


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels, of the checkpoint's own image processor if it comes with one."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)
