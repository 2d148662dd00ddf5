"""Phantom studies: geometry, visibility of the facts, questions, reproducibility."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from medmoe_jax.config import MODALITIES
from medmoe_jax.data import phantom
from medmoe_jax.data.phantom import facts as facts_module
from medmoe_jax.data.phantom.balance import select
from medmoe_jax.data.phantom.canvas import make_canvas
from medmoe_jax.data.phantom.questions import answers


@pytest.fixture(scope="module")
def studies() -> list[phantom.Facts]:
    """Facts of 2000 studies."""
    return [phantom.draw_facts(0, "train", i) for i in range(2000)]


def test_selection_spreads_over_the_images(studies: list[phantom.Facts]):
    asked = [phantom.questions(facts) for facts in studies[:200]]
    chosen = select(asked, 800, np.random.default_rng(0))
    used = [len(questions) for questions in chosen]
    assert min(used) >= 2 and max(used) <= 7
    for mine, possible in zip(chosen, asked, strict=True):
        assert len({q.text for q in mine}) == len(mine)
        assert set(mine) <= set(possible)


def test_answers_are_no_parts_of_one_another(studies: list[phantom.Facts]):
    closed = {q.answer for facts in studies[:300] for q in phantom.questions(facts) if q.closed}
    assert closed <= set(answers())
    lower = [answer.lower() for answer in answers()]
    for one in lower:
        assert not [other for other in lower if other != one and one in other], one


def test_questions_of_an_image_are_unique_and_complete(studies: list[phantom.Facts]):
    kinds = Counter()
    for facts in studies[:300]:
        asked = phantom.questions(facts)
        assert len({q.text for q in asked}) == len(asked)
        kinds.update({(facts.modality, q.kind) for q in asked})
        by_text = {q.text: q.answer for q in asked}
        assert by_text["How many lesions are there?"] == facts.count
        assert by_text["Is there a lesion?"] == facts.present
        assert by_text["What is the imaging modality?"] == facts.modality
        left = any(lesion.x < 0 for lesion in facts.lesions)
        assert by_text["Is there a lesion on the left side?"] == ("yes" if left else "no")
        if len(facts.lesions) == 1:
            upper = facts.lesions[0].y < 0
            assert by_text["Where is the lesion?"].startswith("upper" if upper else "lower")
        if " or " in "".join(by_text):
            for text, answer in by_text.items():
                if " or " in text:
                    assert re.search(rf"\b{answer}\b", text), text
    assert {kind for modality, kind in kinds if modality == "CT"} == {
        "MODALITY", "PLANE", "ORGAN", "PRES", "POS", "COUNT", "SIZE",
    }  # fmt: skip
    assert ("MRI", "ATTRIB") in kinds and ("Pathology", "ATTRIB") in kinds


def test_caption_states_all_facts(studies: list[phantom.Facts]):
    for facts in studies[:300]:
        text = phantom.caption(facts)
        words = [facts.modality, facts.organ, facts.count, facts.size, *facts.quadrants]
        for word in [*words, facts.weighting, facts.density, facts.plane]:
            assert word in text, (word, text)


def test_lesions_keep_to_their_quadrant_and_apart(studies: list[phantom.Facts]):
    patch = 14 / 112
    for facts in studies:
        for lesion in facts.lesions:
            vertical, side = lesion.quadrant.split()
            assert (lesion.x < 0) == (side == "left") and (lesion.y < 0) == (vertical == "upper")
            assert min(abs(lesion.x), abs(lesion.y)) > lesion.radius + 0.005
            assert max(abs(lesion.x), abs(lesion.y)) + lesion.radius < 0.95
            assert lesion.radius / patch >= {"small": 1.2, "large": 2.2}[facts.size]
        for i, one in enumerate(facts.lesions):
            for two in facts.lesions[i + 1 :]:
                assert np.hypot(one.x - two.x, one.y - two.y) > one.radius + two.radius


def test_facts_are_balanced_and_their_numbers_match(studies: list[phantom.Facts]):
    for name in ("left", "right"):
        share = np.mean([facts.side == name for facts in studies if len(facts.lesions) == 1])
        assert 0.42 < share < 0.58
    assert 0.44 < np.mean([facts.size == "small" for facts in studies if facts.size]) < 0.56
    assert Counter(f.modality for f in studies) == {m: len(studies) // 4 for m in MODALITIES}
    for facts in studies[:100]:
        ids = facts.ids()
        assert MODALITIES[ids["modality"]] == facts.modality
        assert ids["plane"] == (facts_module.PLANES.index(facts.plane) if facts.plane else -1)
        assert ids["count"] == len(facts.lesions)
        assert ids["upper_left"] == any(s.x < 0 and s.y < 0 for s in facts.lesions)
        assert (ids["weighting"] >= 0) == (facts.modality == "MRI")


def test_lesion_map_marks_the_patches_of_each_quadrant(studies: list[phantom.Facts]):
    for facts in studies[:300]:
        kinds = phantom.lesion_map(facts, 8)
        halves = {
            "upper": slice(0, 4),
            "left": slice(0, 4),
            "lower": slice(4, 8),
            "right": slice(4, 8),
        }
        marked = set()
        for quadrant in facts_module.QUADRANTS:
            vertical, side = quadrant.split()
            part = kinds[halves[vertical], halves[side]]
            if part.any():
                marked.add(quadrant)
                assert set(np.unique(part)) <= {0, 1 + facts_module.SIZES.index(facts.size)}
        assert marked == set(facts.quadrants)


@pytest.mark.parametrize("modality", MODALITIES)
def test_lesions_stand_out_after_downscaling(modality: str):
    differences = []
    for index in range(MODALITIES.index(modality), 4 * 40, 4):
        image, facts = phantom.draw_image(11, "train", index, 112)
        grey = image.mean(axis=2) if image.ndim == 3 else image.astype(np.float64)
        canvas = make_canvas(*grey.shape)
        for lesion in facts.lesions:
            q = canvas.radius(lesion.x, lesion.y, lesion.radius, lesion.radius)
            core, rim, around = (
                grey[(q >= low) & (q < high)].mean()
                for low, high in ((0, 0.6), (0.7, 1.0), (1.2, 1.5))
            )
            differences.append(max(abs(core - around), abs(rim - around)) / 255)
    assert len(differences) > 25
    assert np.mean(differences) > 0.15
    assert np.percentile(differences, 10) > 0.06


def test_images_depend_on_seed_split_and_number_alone():
    stream = list(phantom.generate(5, 6, split="test", size=64))
    again = list(phantom.generate(5, 2, split="test", size=64, start=4))
    for index, (image, facts) in enumerate(again, start=4):
        np.testing.assert_array_equal(image, stream[index][0])
        assert facts == stream[index][1] == phantom.draw_facts(5, "test", index)
    other, _ = phantom.draw_image(6, "test", 0, 64)
    train, _ = phantom.draw_image(5, "train", 0, 64)
    for image in (other, train):
        assert image.shape != stream[0][0].shape or (image != stream[0][0]).any()
