"""Scorers without a model."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.scorer import build_scorer
from rlpipe.types import Prompt, ScoreRequest

FLAT = np.full((64, 64, 3), 90, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
REQUESTS = [ScoreRequest(name, Prompt(name, "anything"), image) for name, image in (("flat", FLAT), ("noise", NOISE))]


def jpeg(**options):
    return build_scorer(ScorerSection(scorer="jpeg_size", options=options)).score(REQUESTS)


def test_an_image_that_compresses_well_is_worth_more_than_noise():
    flat, noise = jpeg()
    assert 0 > flat.value > noise.value
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "JPEG", quality=95)
    assert noise.parts["kilobytes"] == len(file.getvalue()) / 1000
    assert noise.value == pytest.approx(-noise.parts["kilobytes"] / 500)


def test_the_sign_says_whether_large_or_small_files_are_rewarded_and_the_quality_is_the_jpegs():
    flat, noise = jpeg(per_kilobyte=1.0, quality=50)
    assert 0 < flat.value < noise.value < jpeg()[1].parts["kilobytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"quality": 0}, "quality: 0; give a whole number"), ({"per_kilobyte": 0}, "per_kilobyte: 0 rewards nothing")],
)
def test_a_wrong_setting_is_one_line_that_names_it(options, message):
    with pytest.raises(ConfigError, match=message):
        jpeg(**options)
