"""Rendered conversations and prompts against the official text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medmoe_jax.data import templates
from medmoe_jax.data.problems import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def text(template: str, *turns: tuple[str, str]) -> str:
    return "".join(span.text for span in templates.render(template, turns))


def test_inference_prompts_are_the_official_bytes(fixtures: Path) -> None:
    cases = json.loads((fixtures / "preprocess" / "cases.json").read_text())["inference_prompts"]
    assert len(cases) == 10
    for case in cases:
        made = templates.prompt(case["conv_mode"], case["question"], int(case["image"]))
        assert made.encode() == case["prompt"].encode()
        assert templates.stop_text(case["conv_mode"]) == case["stop_str"]


@pytest.mark.parametrize("template", ["phi", "stablelm"])
def test_two_rounds(template: str) -> None:
    made = text(template, ("human", "<image>\nA?"), ("gpt", "b"), ("human", "C?"), ("gpt", "d"))
    assert made == (
        SYSTEM + "USER: <image>\nA? ASSISTANT: b<|endoftext|>USER: C? ASSISTANT: d<|endoftext|>"
    )


def test_answers_are_marked_with_space_and_end() -> None:
    spans = templates.render("phi", [("human", "A?"), ("gpt", "b")])
    assert [span.text for span in spans if span.answer] == [" b<|endoftext|>"]


def test_empty_answer_leaves_the_role_alone() -> None:
    spans = templates.render("phi", [("human", "A?"), ("gpt", "")])
    assert "".join(span.text for span in spans).endswith("USER: A? ASSISTANT:")
    assert not any(span.answer for span in spans)


def test_leading_gpt_turn_is_left_out() -> None:
    assert text("phi", ("gpt", "Hello"), ("human", "A?"), ("gpt", "b")) == text(
        "phi", ("human", "A?"), ("gpt", "b")
    )


def test_plain_is_image_and_caption() -> None:
    spans = templates.render("plain", [("human", "Describe.\n<image>"), ("gpt", "A CT.")])
    assert spans == [("<image>", False), ("A CT.\n", True)]
    assert templates.prompt("plain", "ignored") == "<image>"
    assert templates.stop_text("plain") == "\n"


def test_plain_refuses_other_conversations() -> None:
    for turns in (
        [("human", "no image"), ("gpt", "b")],
        [("human", "<image><image>"), ("gpt", "b")],
        [("human", "<image>"), ("gpt", "b"), ("human", "C?"), ("gpt", "d")],
    ):
        with pytest.raises(DataError, match="'plain' takes one image"):
            templates.render("plain", turns)


def test_prompt_with_several_images_and_turns() -> None:
    made = templates.prompt("phi", ["<image>\n Which is worse? ", "The second.", " Why? "], 2)
    assert made == SYSTEM + (
        "USER: <image>\n<image>\nWhich is worse? ASSISTANT: The second.<|endoftext|>"
        "USER: Why? ASSISTANT:"
    )
    made = templates.prompt("phi", ["A?", "<image>b", "C?"], (0, 2))
    assert made == SYSTEM + (
        "USER: A? ASSISTANT: b<|endoftext|>USER: <image>\n<image>\nC? ASSISTANT:"
    )


def test_wrong_use_is_told() -> None:
    with pytest.raises(DataError, match="'phi2' is unknown; use one of phi, stablelm, plain"):
        templates.render("phi2", [])
    with pytest.raises(DataError, match="turn 1 is by 'human'"):
        templates.render("phi", [("human", "A?"), ("human", "B?")])
    with pytest.raises(DataError, match="2 messages"):
        templates.prompt("phi", ["A?", "b"])
