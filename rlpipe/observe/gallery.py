"""Samples of rollouts: `rollouts/step_N/` with records.jsonl and PNGs, and one picture of a trajectory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rlpipe.types import Rollout, Score

RECORDS_FILE = "records.jsonl"
_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")
_INK, _PAPER, _QUIET = (28, 30, 34), (255, 255, 255), (110, 114, 120)
_GREEN, _RED = (22, 130, 70), (190, 45, 40)


@dataclass(frozen=True)
class GalleryStep:
    """The saved rollouts of one step; `rows` as in records.jsonl, `damaged_lines` could not be read."""

    step: int
    folder: Path
    rows: tuple[dict, ...]
    damaged_lines: int = 0


def save_rollouts(
    run_dir: str | Path,
    step: int,
    rollouts: Sequence[Rollout],
    scores: Sequence[Sequence[Score | float | None]],
    advantages: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
) -> Path:
    """Write `run_dir`/rollouts/step_N at once, in place of an earlier one of that step; returns the folder.

    Per rollout: `scores` and `advantages` have one entry per segment (None: no score), `texts` the words of
    each reflection. Raises ValueError naming the trajectory whose lengths do not fit.
    """
    files = [[f"{row:03d}_{i}.png" for i in range(len(rollout.images))] for row, rollout in enumerate(rollouts)]
    columns = zip(rollouts, files, scores, advantages, texts, strict=True)
    records = [_record(*column) for column in columns]
    folder = Path(run_dir) / "rollouts" / f"step_{step}"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for rollout, names in zip(rollouts, files, strict=True):
        for name, pixels in zip(names, rollout.images, strict=True):
            Image.fromarray(pixels).save(partial / name)
    for row, rollout in enumerate(rollouts):
        if rollout.source is not None:
            records[row]["source"] = f"{row:03d}_source.png"
            Image.fromarray(rollout.source).save(partial / records[row]["source"])
    lines = (json.dumps(record) + "\n" for record in records)
    (partial / RECORDS_FILE).write_text("".join(lines), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def discard_rollouts(run_dir: str | Path, after_step: int) -> None:
    """Remove the samples of later steps; a resumed run draws them again."""
    for step, folder in _folders(run_dir):
        if step > after_step:
            shutil.rmtree(folder)


def read_rollouts(run_dir: str | Path) -> list[GalleryStep]:
    """All saved steps in order; damaged lines are skipped and counted."""
    steps = []
    for step, folder in _folders(run_dir):
        rows, damaged = [], 0
        lines = (folder / RECORDS_FILE).read_bytes().splitlines() if (folder / RECORDS_FILE).is_file() else []
        for line in lines:
            row = _parse(line)
            if row is None:
                damaged += 1
            else:
                rows.append(row)
        steps.append(GalleryStep(step, folder, tuple(rows), damaged))
    return steps


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.get("segments") else None


def _folders(run_dir: str | Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in Path(run_dir).glob("rollouts/step_*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _record(
    rollout: Rollout,
    files: Sequence[str],
    scores: Sequence[Score | float | None],
    advantages: Sequence[float | None],
    words: Sequence[str],
) -> dict:
    trajectory = rollout.trajectory
    segments = trajectory.segments
    if not (len(segments) == len(scores) == len(advantages)) or len(trajectory.texts) != len(words):
        raise ValueError(
            f"trajectory {trajectory.id!r}: {len(segments)} segments with {len(scores)} scores and "
            f"{len(advantages)} advantages, {len(trajectory.texts)} reflections with {len(words)} texts; "
            "give one of each"
        )
    images, texts = iter(files), zip(words, trajectory.verdicts, trajectory.truncated, strict=False)
    rows = []
    for segment, score, advantage in zip(segments, scores, advantages, strict=True):
        row: dict = {"kind": segment.kind, **_score(score), "advantage": _plain(advantage)}
        if segment.kind == "image":
            row["file"] = next(images)
        else:
            row["text"], row["verdict"], row["truncated"] = next(texts)
        rows.append(row)
    return {
        "id": trajectory.id,
        "prompt_id": trajectory.prompt.id,
        "prompt": trajectory.prompt.text,
        "tag": trajectory.prompt.metadata.get("tag"),
        "seed": trajectory.sampling.seed,
        "guidance": trajectory.sampling.guidance,
        "policy_version": trajectory.policy_version,
        "segments": rows,
    }


def _score(score: Score | float | None) -> dict:
    if not isinstance(score, Score):
        return {"score": _plain(score)}
    row: dict = {"score": _plain(score.value)}
    if score.parts:
        row["parts"] = {name: _plain(value) for name, value in score.parts.items()}
    return {**row, "error": score.error} if score.error else row


def _plain(value: float | None) -> float | None:
    """A Python float that JSON can hold; NaN and infinity are missing."""
    return float(value) if value is not None and math.isfinite(value) else None


def trajectory_strip(
    rollout: Rollout, texts: Sequence[str], image_px: int = 240, font_path: str | None = None
) -> Image.Image:
    """One picture of a trajectory: the prompt, and below it image, verdict with its reason, image.

    `texts` are the words of the reflections. Pixels are enlarged to about `image_px` by nearest neighbour.
    """
    large, text_font = _font(22, font_path), _font(20, font_path)
    images = [_enlarged(pixels, image_px) for pixels in rollout.images]
    gap, text_width = 28, 250
    side = images[0].height
    width = 2 * gap + len(images) * side + len(texts) * (text_width + 2 * gap)
    strip = Image.new("RGB", (width, side + 96), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((gap, 24), f'"{rollout.trajectory.prompt.text}"', fill=_INK, font=large)
    x, top = gap, 68
    for number, image in enumerate(images):
        strip.paste(image, (x, top))
        draw.rectangle((x - 1, top - 1, x + side, top + side), outline=(210, 212, 216))
        x += side + gap
        if number < len(texts):
            leads_on = number + 1 < len(images)
            _draw_verdict(draw, (x, top + side // 2), texts[number], text_width, text_font, leads_on)
            x += text_width + gap
    return strip


def _draw_verdict(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, font, leads_on: bool) -> None:
    """The words around the point `at`, Yes or No in colour, an arrow below where another image follows."""
    verdict, _, reason = text.partition(",")
    x, middle = at
    lines = _wrapped(draw, reason.strip(), width, font)
    y = middle - 15 * (len(lines) + 2)
    draw.text((x, y), verdict, fill=_GREEN if verdict == "Yes" else _RED, font=font)
    for line in lines:
        y += 27
        draw.text((x, y), line, fill=_INK, font=font)
    if not leads_on:
        return
    y += 52
    draw.line((x, y, x + width - 10, y), fill=_QUIET, width=2)
    draw.polygon([(x + width, y), (x + width - 12, y - 6), (x + width - 12, y + 6)], fill=_QUIET)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _enlarged(pixels, image_px: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = max(1, round(image_px / image.height))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _font(size: int, path: str | None):
    for name in (path, *_FONTS) if path else _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
