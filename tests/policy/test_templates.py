from __future__ import annotations

from dataclasses import replace

import pytest

from rlpipe.data.prompts import PromptError
from rlpipe.policy.templates import BOI, EOI, EOS, Templates, check_prompts
from rlpipe.schema import Config, TemplateSection
from rlpipe.types import Prompt

CAPTION = "a photo of two red circles"
INSTRUCTION = "a green star"


@pytest.fixture
def templates(tiny_policy) -> Templates:
    return Templates(tiny_policy.templates.tokenizer)


def text(templates: Templates, ids: list[int]) -> str:
    return templates.tokenizer.decode(ids)


def test_a_prompt_is_framed_from_begin_of_sentence_to_begin_of_image(templates):
    ids = templates.prompt(f"  {CAPTION} ")
    assert ids == templates.prompt(CAPTION)
    assert ids[0] == templates.bos and ids[-1] == templates.boi
    words = templates.tokenizer.encode(CAPTION, add_special_tokens=False)
    assert any(ids[i : i + len(words)] == words for i in range(len(ids)))
    blank = templates.blank(ids)
    assert len(blank) == len(ids) and set(blank[1:-1]) == {templates.pad}


def test_the_source_of_an_edit_stands_between_begin_and_end_of_image(templates):
    before, after = templates.edit(INSTRUCTION)
    assert (before[0], before[-1]) == (templates.bos, templates.boi)
    assert (after[0], after[-1]) == (templates.eoi, templates.boi)
    words = templates.tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    assert after[1 : 1 + len(words)] == words


def test_a_blank_edit_hides_the_instruction_and_keeps_its_frame(templates):
    edits = [templates.edit(words) for words in (INSTRUCTION, "a photo of two")]
    blanks = [templates.blank_edit(*framed) for framed in edits]
    for (before, after), (blank_before, blank_after) in zip(edits, blanks, strict=True):
        hidden = [i for i, (one, two) in enumerate(zip(after, blank_after, strict=True)) if one != two]
        assert blank_before == before
        assert {blank_after[i] for i in hidden} == {templates.pad}
    words = len(templates.tokenizer.encode(INSTRUCTION, add_special_tokens=False))
    assert blanks[0][1].count(templates.pad) == words


def test_every_string_can_be_replaced(templates):
    strings = TemplateSection(
        prompt=f"photo of {{caption}}{BOI}",
        look=f"{EOI}image",
        redraw=f"{EOS}draw{BOI}",
        edit=f"draw{BOI}{{source}}{EOI}image {{instruction}}{BOI}",
    )
    config = Config()
    config.policy.templates = strings
    other = templates.configured(config)
    assert text(other, other.prompt(CAPTION)) != text(templates, templates.prompt(CAPTION))
    assert (other.look[0], other.redraw[0], other.redraw[-1]) == (other.eoi, other.eos, other.boi)
    assert len(other.look) < len(templates.look) and len(other.redraw) < len(templates.redraw)
    assert len(other.edit("star")[1]) == 1 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "<|User|>: {caption}"}, "policy.templates.prompt: does not end with <begin_of_image>"),
        ({"prompt": f"photo{BOI}"}, "policy.templates.prompt: .* lacks {caption}"),
        ({"edit": f"{{instruction}}{{source}}{BOI}"}, "policy.templates.edit: .* lacks {source} then {instruction}"),
        ({"redraw": "draw"}, "policy.templates.redraw: does not end"),
    ],
)
def test_a_template_that_cannot_frame_anything_is_named(templates, change, message):
    wrong = replace(templates, strings=replace(templates.strings, **change))
    with pytest.raises(ValueError, match=message):
        wrong.prompt(CAPTION), wrong.redraw, wrong.edit(INSTRUCTION)


def test_a_long_prompt_is_refused_or_cut_and_its_frame_stays(templates):
    whole = templates.prompt(CAPTION)
    limited = replace(templates, max_prompt_tokens=len(whole) - 2)
    with pytest.raises(ValueError, match=f"is {len(whole)} tokens .* data.long_prompts=cut"):
        limited.prompt(CAPTION)
    assert replace(limited, cut=True).prompt(CAPTION) == templates.prompt("a photo of two")
    assert replace(templates, max_prompt_tokens=len(whole)).prompt(CAPTION) == whole
    with pytest.raises(ValueError, match="policy.max_prompt_tokens: 2 is less than the frame's own"):
        replace(templates, max_prompt_tokens=2, cut=True).prompt(CAPTION)


def test_a_long_instruction_is_refused_or_cut_and_its_frame_stays(templates):
    before, after = templates.edit(INSTRUCTION)
    limited = replace(templates, max_prompt_tokens=len(before) + len(after) - 1)
    with pytest.raises(ValueError, match="policy.max_prompt_tokens"):
        limited.edit(INSTRUCTION)
    words = len(templates.tokenizer.encode(INSTRUCTION, add_special_tokens=False))
    cut = replace(limited, cut=True).edit(INSTRUCTION)
    assert cut == (before, after[:words] + after[words + 1 :])


def test_prompts_that_are_too_long_are_named_before_anything_starts(templates):
    prompts = [Prompt("short", "a star"), Prompt("long", "a star " * 300)]
    for program in ("introspect", "edit"):
        rows = [replace(prompt, source_image="star.png") for prompt in prompts]
        with pytest.raises(PromptError, match="long: prompt 'a star a star"):
            check_prompts(rows, templates, program)
        check_prompts(rows[:1], templates, program)
    with pytest.raises(PromptError, match="short: no source_image"):
        check_prompts(prompts[:1], templates, "edit")
