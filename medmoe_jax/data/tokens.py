"""Tokenizer and ids: rendered text -> ids with image places, labels from the answers' spans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from medmoe_jax.data import templates
from medmoe_jax.data.problems import DataError, check_text
from medmoe_jax.data.templates import IMAGE_TOKEN, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_ID = -200  # stands for a whole image until `merge.expand`
IGNORE = -100  # label without loss
PHI_UNK, STABLELM_UNK = "<|extra_0|>", "<|reg0|>"


class Encoded(NamedTuple):
    """Token ids (IMAGE_ID = an image) and one label an id (IGNORE = no loss), not shifted."""

    ids: list[int]
    labels: list[int]


def load_tokenizer(folder: str | Path, family: str, vocab: int = 0) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder, with the unknown and padding words of Med-MoE.

    phi gets the new word '<|extra_0|>' as unknown word, stablelm its own '<|reg0|>'; both pad with
    the unknown word, which must differ from the end word. Nothing is downloaded and no code from
    the folder is run.

    Args:
      folder: holds tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json.
      family: 'phi' or 'stablelm' (`LlmConfig.family`).
      vocab: words of the model that it is for (`LlmConfig.vocab`); 0 = not known.

    Raises:
      DataError: the folder holds no usable tokenizer, or it breaks one of these rules.

    Source: `moellava/train/train.py`.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no tokenizer: folder {folder} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True, clean_up_tokenization_spaces=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(
            f"{folder} holds no tokenizer that can be read ({error}); it must have tokenizer.json "
            "and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: tokenizer.json is missing; labels need a fast tokenizer")
    if family == "phi":
        tokenizer.add_special_tokens({"unk_token": PHI_UNK})
    elif family == "stablelm":
        if STABLELM_UNK not in tokenizer.get_vocab():
            raise DataError(f"{folder}: no word {STABLELM_UNK}; this is no StableLM-2 tokenizer")
        tokenizer.unk_token = STABLELM_UNK
    else:
        raise DataError(f"tokenizer family {family!r} is unknown; use 'phi' or 'stablelm'")
    tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.eos_token != templates.END:
        raise DataError(
            f"{folder}: the end word is {tokenizer.eos_token!r}, the templates end answers with "
            f"{templates.END!r}"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError(f"{folder}: padding and end are the same word {tokenizer.eos_token!r}")
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        raise DataError(f"{folder}: the tokenizer adds words of its own around a text")
    # No text has the unknown word, which is new where the tokenizer has none of its own.
    words = tokenizer.get_vocab()
    most = 1 + max(number for word, number in words.items() if word != tokenizer.unk_token)
    if vocab and most > vocab:
        raise DataError(
            f"{folder}: the tokenizer has {most:,} words, the model {vocab:,}; use the tokenizer "
            "that belongs to the model"
        )
    return tokenizer


def encode(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Ids and labels of a rendered conversation.

    The joined text is cut at every <image> and each part tokenised whole, so the ids are those of
    the official code. Labels come from where each token lies in the text: a token is learnt if it
    lies wholly inside an answer. The official code counts tokens of re-tokenised pieces instead
    and masks the whole sample where the counts differ; that cannot happen here. An end mark
    written inside an answer becomes the end token, as in the official code, and is learnt.

    Args:
      spans: from `templates.render`.
      tokenizer: a fast one (`load_tokenizer`).

    Raises:
      DataError: the text holds halves of characters.

    Source: `tokenizer_image_token`, `preprocess_phi`, `preprocess_plain` of Med-MoE.
    """
    answers: list[tuple[int, int]] = []  # first and past-the-last character
    place = 0
    for span in spans:
        if span.answer:
            answers.append((place, place + len(span.text)))
        place += len(span.text)
    ids: list[int] = []
    labels: list[int] = []
    start = 0  # character at which the part begins
    text = "".join(span.text for span in spans)
    check_text(text)
    for number, part in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_ID)
            labels.append(IGNORE)
        if part:
            coded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            for token, (low, high) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
                inside = any(a <= start + low and start + high <= b for a, b in answers)
                ids.append(token)
                labels.append(token if inside else IGNORE)
        start += len(part) + len(IMAGE_TOKEN)
    return Encoded(ids, labels)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt (`templates.prompt`) with IMAGE_ID at every <image>."""
    return encode([Span(text, False)], tokenizer).ids


def stop_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which an answer of this template ends."""
    return tokenizer(templates.stop_text(template), add_special_tokens=False)["input_ids"]


def stopped(new_ids: Sequence[int], stop: Sequence[int]) -> bool:
    """Whether the generated ids end with the stop ids. Source: `KeywordsStoppingCriteria`."""
    return len(new_ids) >= len(stop) and list(new_ids[-len(stop) :]) == list(stop)
