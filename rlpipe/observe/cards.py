"""The gallery of a run as HTML: one card for each saved trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rlpipe.observe.gallery import GalleryStep


def gallery_section(steps: Sequence[GalleryStep]) -> str:
    """All saved trajectories of the steps, with buttons that choose among them."""
    steps = [step for step in steps if step.rows]
    if not steps:
        return ""
    options = "".join(f'<option value="{step.step}">step {step.step}</option>' for step in steps)
    filters = "".join(
        f'<button type="button" data-filter="{value}" aria-pressed="{"true" if value == "all" else "false"}">'
        f"{label}</button>"
        for value, label in (
            ("all", "All"),
            ("yes", "Said Yes"),
            ("no", "Said No"),
            ("repaired", "Repaired"),
            ("damaged", "Damaged"),
        )
    )
    cards = "".join(_card(step, row) for step in steps for row in step.rows)
    return (
        '<section id="gallery"><h2>Gallery</h2><p class="lead">First image, verdict with its reason, next '
        "image, and what each segment scored. Repaired and damaged are by the score that trained the policy: "
        "below one half at first and above at the end, or the reverse.</p>"
        '<div class="controls"><select aria-label="step">'
        f'<option value="all">all steps</option>{options}</select>{filters}<span id="count"></span></div>'
        f'<div class="cards">{cards}</div></section>'
    )


def _card(step: GalleryStep, row: dict) -> str:
    images = [s for s in row["segments"] if s["kind"] == "image"]
    texts = [s for s in row["segments"] if s["kind"] == "text"]
    said = "yes" if texts and texts[0].get("verdict") else "no" if texts else ""
    picture = [_picture(step, row, image) for image in images]
    words = [_words(text) for text in texts]
    middle = [part for pair in zip(picture, words, strict=False) for part in pair]
    middle += picture[len(words) :] or ['<div class="kept">accepted</div>']
    if row.get("source"):
        middle.insert(0, _picture(step, row, {"file": row["source"]}) + '<div class="kept">edited</div>')
    tag = f"<i>{escape(str(row['tag']).replace('_', ' '))}</i>" if row.get("tag") else ""
    return (
        f'<article class="card" data-step="{step.step}" data-said="{said}" data-change="{_change(images)}">'
        f"<h3>{escape(str(row.get('prompt', '')))} {tag}<small>step {step.step}</small></h3>"
        f'<div class="flow">{"".join(middle)}</div>{_scores(row["segments"])}</article>'
    )


def _change(images: Sequence[dict]) -> str:
    first, last = images[0].get("score"), images[-1].get("score")
    if first is None or last is None or (first > 0.5) == (last > 0.5):
        return ""
    return "repaired" if last > 0.5 else "damaged"


def _picture(step: GalleryStep, row: dict, image: dict) -> str:
    name = str(image.get("file", ""))
    if not (step.folder / name).is_file():
        return '<div class="kept">image missing</div>'
    source = escape(f"../rollouts/{step.folder.name}/{name}", quote=True)
    prompt = escape(str(row.get("prompt", "")), quote=True)
    return f'<img loading="lazy" width="144" height="144" src="{source}" alt="{prompt}">'


def _words(text: dict) -> str:
    said, _, reason = str(text.get("text", "")).partition(",")
    kind = "yes" if text.get("verdict") else "no"
    cut = " <small>(cut at the length limit)</small>" if text.get("truncated") else ""
    return f'<p class="says {kind}"><b>{escape(said)}</b>{escape(reason)}{cut}</p>'


def _scores(segments: Sequence[dict]) -> str:
    names, num_images = [], 0
    segments = [*segments, *[{"kind": "image"}] * (3 - len(segments))]  # one width for all cards
    for segment in segments:
        num_images += segment["kind"] == "image"
        names.append(("first image" if num_images == 1 else "next image") if segment["kind"] == "image" else "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    score = "".join(f"<td{_why(s)}>{_number(s.get('score'))}</td>" for s in segments)
    advantage = "".join(f'<td class="{_sign(s)}">{_number(s.get("advantage"), "+")}</td>' for s in segments)
    return (
        f'<table class="scores"><thead><tr><th></th>{head}</tr></thead><tbody><tr><th>score</th>{score}</tr>'
        f"<tr><th>advantage</th>{advantage}</tr></tbody></table>"
    )


def _why(segment: dict) -> str:
    parts = "; ".join(f"{name} {_number(value)}" for name, value in (segment.get("parts") or {}).items())
    words = segment.get("error") or parts
    return f' title="{escape(str(words), quote=True)}"' if words else ""


def _sign(segment: dict) -> str:
    advantage = segment.get("advantage") or 0.0
    return "up" if advantage > 0 else "down" if advantage < 0 else ""


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"
