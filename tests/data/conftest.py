"""A small labelled set on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

State = tuple[int, float]
COLORS = ("red", "orange", "yellow", "green", "blue")
"""Reasons name one by the image's number, in words that the tiny tokenizer knows."""


@pytest.fixture
def write_set() -> Callable[..., Path]:
    """`write_set(folder, flux=[[(4, 0.9), (0, 0.1)]])`: per source and prompt the (state, prob) of its images.

    Images are 48 x 48 noise; reasons say what their states promise. Returns the folder.
    """

    def write(folder: Path, prefix: str = "", **sources: list[list[State]]) -> Path:
        (folder / "labels").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for source, prompts in sources.items():
            rows = []
            for number, states in enumerate(prompts):
                data = []
                for i, (state, prob) in enumerate(states):
                    path = folder / "images" / source / f"{number}_{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
                    word = "yes" if state in (3, 4) else "no"
                    name = f"{prefix}{path.relative_to(folder)}"
                    reason = f"{word}, there is a {COLORS[i % len(COLORS)]} circle."
                    data.append({"id": i, "img_path": name, "reason": reason, "prob": prob, "state": state})
                rows.append({"promptid": number, "prompt": f"a photo of {number} circles", "data": data})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "labels" / f"{source}_0.7.jsonl").write_text(text)
        return folder

    return write
