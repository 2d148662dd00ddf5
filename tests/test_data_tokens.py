"""Ids and labels against the official preprocessing, and where the official code masks rows out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_data

from medmoe_jax.data import templates, tokens
from medmoe_jax.data.problems import DataError


@pytest.fixture(scope="module")
def golden(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "preprocess" / "cases.json").read_text())


@pytest.fixture(scope="module")
def official(fixtures: Path) -> dict[str, Any]:
    folder = fixtures / "preprocess" / "tokenizer"
    return {
        "phi": tokens.load_tokenizer(folder, "phi"),
        "stablelm": tokens.load_tokenizer(folder, "stablelm"),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokens.load_tokenizer(
        tiny_data.save_tokenizer(tmp_path_factory.mktemp("tokenizer")), "stablelm"
    )


def encode_case(case: dict[str, Any], official: dict[str, Any]) -> tokens.Encoded:
    turns = [(turn["from"], turn["value"]) for turn in case["conversations"]]
    spans = templates.render(case["version"], turns)
    return tokens.encode(spans, official["stablelm" if case["version"] == "stablelm" else "phi"])


def learnt(coded: tokens.Encoded, tokenizer: Any) -> list[str]:
    """Texts of the runs of labelled tokens."""
    runs: list[list[int]] = [[]]
    for label in coded.labels:
        if label == tokens.IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_padding_words(official: dict[str, Any]) -> None:
    assert (official["phi"].pad_token_id, len(official["phi"])) == (512, 513)
    assert (official["stablelm"].pad_token_id, len(official["stablelm"])) == (1, 512)


def test_ids_and_labels_of_all_cases(golden: dict[str, Any], official: dict[str, Any]) -> None:
    """Ids always; labels wherever the official code kept the sample."""
    labels_compared = 0
    for case in golden["cases"]:
        coded = encode_case(case, official)
        ids, labels = coded
        if not case["has_image"]:  # the official code cuts texts without images, and only those
            ids, labels = (part[: case["model_max_length"]] for part in (ids, labels))
        assert ids == case["input_ids"], case["name"]
        if case["warning"] is None:
            assert labels == case["labels"], case["name"]
            labels_compared += 1
    assert (len(golden["cases"]), labels_compared) == (40, 33)


def test_rows_the_official_code_masks_out(golden: dict[str, Any], official: dict[str, Any]) -> None:
    found = {}
    for case in golden["cases"]:
        if case["warning"]:
            assert set(case["labels"]) == {tokens.IGNORE}
            found[case["name"], case["version"]] = learnt(
                encode_case(case, official), official["phi"]
            )
    assert found["empty_answer", "phi"] == found["empty_answer", "stablelm"] == []
    assert found["empty_answer_second_turn", "phi"] == [" Yes<|endoftext|>"]
    assert found["empty_answer_second_turn", "stablelm"] == [" Yes<|endoftext|>"]
    assert found["single_image@pad_eos", "phi"] == [
        " Magnetic resonance imaging, T2 weighted.<|endoftext|>"
    ]
    assert len(found) == 7


def test_collator_batches(golden: dict[str, Any], official: dict[str, Any]) -> None:
    """The official batch is our rows, cut at model_max_length and padded with the padding word."""
    cases = {(case["name"], case["version"]): case for case in golden["cases"]}
    for batch in golden["collator"]:
        pad = official[batch["version"]].pad_token_id
        assert pad == batch["pad_token_id"]
        for number, name in enumerate(batch["cases"]):
            coded = encode_case(cases[name, batch["version"]], official)
            ids, labels = (part[: batch["model_max_length"]] for part in coded)
            rest = len(batch["input_ids"][number]) - len(ids)
            assert ids + [pad] * rest == batch["input_ids"][number]
            assert labels + [tokens.IGNORE] * rest == batch["labels"][number]
            assert [1] * len(ids) + [0] * rest == batch["attention_mask"][number]


def test_inference_prompts(golden: dict[str, Any], official: dict[str, Any]) -> None:
    for case in golden["inference_prompts"]:
        made = templates.prompt(case["conv_mode"], case["question"], int(case["image"]))
        assert tokens.encode_prompt(made, official[case["conv_mode"]]) == case["input_ids"]


def test_stopping(golden: dict[str, Any], official: dict[str, Any]) -> None:
    for case in golden["stopping"]:
        stop = tokens.stop_ids("phi", official["phi"])
        assert official["phi"].decode(stop) == case["keyword"]
        assert tokens.stopped(case["generated_ids"], stop) is case["stop"]
    assert not tokens.stopped([], [0])


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        " No. ",
        "\n 1. effusion\n 2.  two  ",
        "Größe 🫁 胸",
        "a ASSISTANT: b",
        "x<|endoftext|>y",
    ],
)
def test_every_answer_is_learnt_whole(answer: str, tokenizer: Any) -> None:
    """Also the answers that make the official code mask the sample out."""
    turns = [
        ("human", "<image>\nWhat is USER: this ASSISTANT: now?"),
        ("gpt", answer),
        ("human", "And?"),
        ("gpt", "3"),
    ]
    spans = templates.render("phi", turns)
    coded = tokens.encode(spans, tokenizer)
    assert learnt(coded, tokenizer) == [f" {answer}<|endoftext|>", " 3<|endoftext|>"]
    before, after = "".join(span.text for span in spans).split("<image>")
    expected = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
    assert coded.ids == [*expected[0], tokens.IMAGE_ID, *expected[1]]
    assert all(label in (tokens.IGNORE, i) for i, label in zip(*coded, strict=True))


def test_images_anywhere_are_never_learnt(tokenizer: Any) -> None:
    turns = [("human", "<image><image>\nCompare\n<image>"), ("gpt", "as <image> shows")]
    coded = tokens.encode(templates.render("phi", turns), tokenizer)
    places = [place for place, i in enumerate(coded.ids) if i == tokens.IMAGE_ID]
    assert len(places) == 4
    assert {coded.labels[place] for place in places} == {tokens.IGNORE}
    assert learnt(coded, tokenizer) == [" as ", " shows<|endoftext|>"]


def test_token_across_the_border_is_not_learnt(tokenizer: Any) -> None:
    """Where the tokenizer joins characters of prompt and answer, ids stay those of the text."""
    spans = [templates.Span("the assis", False), templates.Span("tant", True)]
    whole = tokenizer("the assistant", add_special_tokens=False, return_offsets_mapping=True)
    across = [low < 9 < high for low, high in whole["offset_mapping"]]
    assert any(across)  # the tokenizer has learnt 'assistant'
    coded = tokens.encode(spans, tokenizer)
    assert coded.ids == whole["input_ids"]
    assert [label for label, cut in zip(coded.labels, across, strict=True) if cut] == [
        tokens.IGNORE
    ]


def test_unusable_tokenizers_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        tokens.load_tokenizer(tmp_path / "none", "phi")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer that can be read"):
        tokens.load_tokenizer(tmp_path / "empty", "phi")
    folder = tiny_data.save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="'llama' is unknown"):
        tokens.load_tokenizer(folder, "llama")
    phi = tokens.load_tokenizer(folder, "phi")
    assert phi.pad_token == "<|extra_0|>" and phi.unk_token_id == len(phi) - 1
    tokens.load_tokenizer(folder, "phi", len(phi) - 1)  # no text has the new word
    with pytest.raises(DataError, match=f"has {len(phi) - 1} words, the model {len(phi) - 2};"):
        tokens.load_tokenizer(folder, "phi", len(phi) - 2)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("reg0", "reg9"), encoding="utf-8")
    with pytest.raises(DataError, match=r"no word <\|reg0\|>"):
        tokens.load_tokenizer(folder, "stablelm")
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(
        config.replace('"eos_token": "<|endoftext|>"', '"eos_token": "<|reg9|>"')
    )
    with pytest.raises(DataError, match="the end word is"):
        tokens.load_tokenizer(folder, "phi")


def test_saved_phi_tokenizer_loads_the_same(tmp_path: Path) -> None:
    first = tokens.load_tokenizer(tiny_data.save_tokenizer(tmp_path / "a"), "phi")
    first.save_pretrained(tmp_path / "b")
    second = tokens.load_tokenizer(tmp_path / "b", "phi")
    assert (len(first), first.pad_token_id) == (len(second), second.pad_token_id)
