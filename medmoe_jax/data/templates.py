"""Conversation templates: turns -> text, with the parts that are answers marked.

The templates `phi` and `stablelm` are the same text; both names exist because users know them.

Source: `moellava/conversation.py`, `preprocess_phi` and `preprocess_plain` of Med-MoE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from medmoe_jax.data.problems import DataError

TEMPLATES = ("phi", "stablelm", "plain")
IMAGE_TOKEN = "<image>"
END = "<|endoftext|>"  # what ends an answer
HUMAN, GPT = "human", "gpt"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Turn = tuple[str, str]  # role (HUMAN or GPT), text


class Span(NamedTuple):
    """A piece of the rendered text."""

    text: str
    answer: bool  # True: the model learns to write it


def check_template(template: str) -> None:
    """Raises DataError where `template` is no known name."""
    if template not in TEMPLATES:
        raise DataError(f"data.template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")


def from_human(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns without a greeting of the assistant before the first question."""
    return turns[1:] if turns and turns[0][0] == GPT else turns


def render(template: str, turns: Sequence[Turn]) -> list[Span]:
    """Text of a training conversation, in pieces.

    An answer's piece has the space before it and the end mark after it. An empty message leaves
    its role's name alone ('ASSISTANT:'), with nothing to learn. 'plain' is the image followed by
    the first answer and a line feed; the question is not part of it.

    Args:
      template: one of TEMPLATES.
      turns: human and gpt in turn; a leading gpt turn is left out.

    Returns:
      Spans whose texts, joined, are the whole text.

    Raises:
      DataError: unknown template, roles out of order, or a conversation that 'plain' cannot hold.
    """
    check_template(template)
    turns = from_human(turns)
    for place, (role, _) in enumerate(turns):
        if role != (HUMAN, GPT)[place % 2]:
            raise DataError(f"turn {place} is by {role!r}; human and gpt must take turns")
    if template == "plain":
        return _render_plain(turns)
    spans = [Span(f"{SYSTEM} ", False)]
    for role, text in turns:
        if role == HUMAN:
            spans.append(Span(f"USER: {text} " if text else "USER:", False))
        else:
            spans.append(Span("ASSISTANT:", False))
            if text:
                spans.append(answer(template, text))
    return spans


def answer(template: str, text: str) -> Span:
    """An answer as it stands behind a prompt, with what ends it."""
    space = "" if template == "plain" else " "
    return Span(f"{space}{text}{stop_text(template)}", True)


def _render_plain(turns: Sequence[Turn]) -> list[Span]:
    if len(turns) != 2 or turns[0][1].count(IMAGE_TOKEN) != 1 or IMAGE_TOKEN in turns[1][1]:
        raise DataError(
            "template 'plain' takes one image, one question with one <image> and one answer; "
            "use 'phi' or 'stablelm' for other conversations"
        )
    return [Span(IMAGE_TOKEN, False), answer("plain", turns[1][1])]


def prompt(template: str, messages: str | Sequence[str], images: int | Sequence[int] = 1) -> str:
    """Text that asks for the next answer.

    Args:
      template: one of TEMPLATES.
      messages: a question, or question, answer, question, ... ending with a question. <image> is
        removed from all of them, outer white space from the questions.
      images: how many images come before the first question, or before each.

    Returns:
      '... USER: <image>\\nquestion ASSISTANT:', no space at the end; only the images with 'plain'.

    Raises:
      DataError: unknown template, or messages that do not end with a question.

    Source: `model_vqa_med.py` of Med-MoE.
    """
    check_template(template)
    messages = [messages] if isinstance(messages, str) else list(messages)
    if len(messages) % 2 == 0:
        raise DataError(f"{len(messages)} messages; a prompt is question, answer, ..., question")
    counts = [images] if isinstance(images, int) else images
    if template == "plain":
        return IMAGE_TOKEN * sum(counts)
    messages = [text.replace(IMAGE_TOKEN, "") for text in messages]
    messages[::2] = [text.strip() for text in messages[::2]]
    for place, count in enumerate(counts):
        messages[2 * place] = f"{IMAGE_TOKEN}\n" * count + messages[2 * place]
    turns = [((HUMAN, GPT)[place % 2], text) for place, text in enumerate(messages)]
    return "".join(span.text for span in render(template, turns)) + "ASSISTANT:"


def follow_up(template: str, question: str, images: int = 0) -> str:
    """Text that goes on after an answer (and its end mark) and asks for the next one.

    Args:
      template: 'phi' or 'stablelm'.
      question: <image> and outer white space are removed from it.
      images: how many new images come before it.

    Raises:
      DataError: unknown template, or one that holds a single answer.
    """
    check_template(template)
    if template == "plain":
        raise DataError("template 'plain' holds one answer; use 'phi' or 'stablelm' to go on")
    text = question.replace(IMAGE_TOKEN, "").strip()
    asked = render(template, [(HUMAN, f"{IMAGE_TOKEN}\n" * images + text)])
    return "".join(span.text for span in asked[1:]) + "ASSISTANT:"


def stop_text(template: str) -> str:
    """The text at which an answer ends. Raises DataError on an unknown template."""
    check_template(template)
    return "\n" if template == "plain" else END
