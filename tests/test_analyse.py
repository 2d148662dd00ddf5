"""The command and the explanation of one question, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import tiny_service
from PIL import Image

import medmoe_jax
from medmoe_jax.analyse import __main__ as command
from medmoe_jax.analyse import explain, inputs, plots, routing, text
from medmoe_jax.analyse.explain import Explanation, Settings
from medmoe_jax.analyse.scoring import Scorer
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.data.problems import DataError
from medmoe_jax.metrics import MissingExtra
from medmoe_jax.model import Model
from medmoe_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("quick_compile")

QUESTION = "Is there a lesion?"
SETTINGS = Settings(steps=48, draws=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it rows of all modalities with pictures that are wider than high."""
    root = tmp_path_factory.mktemp("analyse")
    for i in range(5):
        tiny_data.save_image(root / "images" / f"i{i}.png", i, (24, 12))
    names = ("CT", "MRI", "X-ray", "Pathology", "")
    tiny_data.save_rows(
        root / "rows.jsonl", [tiny_data.row(i, modality=names[i]) for i in range(5)]
    )
    tiny_service.save(root / "model", tiny_service.config("phi", MoeConfig(top_k=2)))
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return medmoe_jax.load(root / "model")


@pytest.fixture(scope="module")
def found(model: Model, root: Path) -> Explanation:
    return explain.explain(model, QUESTION, root / "images" / "i0.png", settings=SETTINGS)


def test_the_answer_is_that_of_the_model(model: Model, root: Path, found: Explanation) -> None:
    reply = model.generate(QUESTION, root / "images" / "i0.png", Sampling(max_new_tokens=64))
    assert (found.answer, found.own, found.modality) == (reply.text, True, reply.modality)
    assert math.log(found.probability) == pytest.approx(math.log(reply.confidence), abs=1e-3)
    assert found.curve is not None
    assert found.curve.top[0] == pytest.approx(found.probability, rel=1e-3)


def test_attribution_adds_up_and_respects_padding(found: Explanation) -> None:
    """Wide pictures fill the middle of the square: with 2 x 2 patches all show some of it. What
    they get is what hiding all of them takes from log p; jumps of the routing are the difference.
    """
    assert found.shown.all() and found.attribution.shape == (1, 2, 2)
    patches = explain.report(found)["patches"]
    assert patches["sum"] == pytest.approx(patches["difference"], abs=0.5)
    assert found.overlay().shape == (12, 24)
    assert found.overlay()[0, 0] == found.attribution[0, 0, 0]


def test_a_given_answer_has_its_score(model: Model, root: Path, found: Explanation) -> None:
    picture = root / "images" / "i0.png"
    other = explain.explain(model, QUESTION, Image.open(picture), "yes", SETTINGS)
    (scores,) = model.score([QUESTION], [picture], [["yes"]])
    assert math.log(other.probability) == pytest.approx(scores[0], abs=1e-3)
    assert (other.answer, other.own, other.modality) == ("yes", False, None)
    assert "".join(other.tokens).endswith("ASSISTANT: yes<|endoftext|>")
    assert [inputs.KINDS[k] for k in other.kinds[-3:]] == ["question", "answer", "answer"]
    assert (other.kinds == 0).sum() == 4 and not np.allclose(other.attribution, found.attribution)


def test_experts_are_those_that_the_loads_count(model: Model, found: Explanation) -> None:
    assert found.experts is not None and found.experts.layers == model.config.moe_layers
    row = inputs.of_answer(model, QUESTION, model.pixels(list(found.pictures)), [3, 4, 5])
    experts = explain.experts(model, row)
    trace = routing.trace(model.params, model.config, inputs.batches([row], 1))
    assert experts is not None
    kinds = inputs.kinds(inputs.batch([row]))[0][: len(row.merged.tokens)]
    for kind in range(3):
        chosen = experts.choice[:, kinds == kind].reshape(len(experts.layers), -1)
        counts = [np.bincount(layer, minlength=4) for layer in chosen]
        np.testing.assert_array_equal(trace.chosen[0, :, kind], counts)
    np.testing.assert_allclose(experts.probability.sum(-1), 1, rtol=1e-5)
    top = np.take_along_axis(experts.probability, experts.choice, -1)
    np.testing.assert_allclose(experts.weight, top / top.sum(-1, keepdims=True), rtol=1e-4)


def test_hidden_patches_have_the_colour_of_the_padding(model: Model, root: Path) -> None:
    row = inputs.of_answer(model, QUESTION, model.pixels(root / "images" / "i0.png"), [3])
    scorer = Scorer(model, row, 8)
    shown = scorer.without(np.array([[False, True, False, False], [False] * 4]))
    assert (shown[1] == scorer.pixels).all()
    assert (shown[0, 0, :4, 4:] == scorer.blank).all()
    assert (shown[0, 0, 4:] == scorer.pixels[0, 4:]).all()
    assert np.abs(scorer.blank).max() < 0.02
    # Batches of eight: ten variants are what they are alone.
    masks = np.arange(10)[:, None] >> np.arange(4) & 1 > 0
    alone = [scorer.hidden(masks[i : i + 1])[0] for i in range(10)]
    np.testing.assert_allclose(scorer.hidden(masks), alone, rtol=1e-5)
    assert scorer.gradients(shown).shape == shown.shape


def run(root: Path, *words: object) -> dict[str, Any]:
    """The command with figures; what it writes."""
    out = root / "out"
    given = ["--model-path", root / "model", "--out", out, "--batch-size", 8, *words]
    command.analyse(command.arguments().parse_args([str(word) for word in given]))
    assert (out / "analysis.md").read_text().startswith("#")
    return json.loads((out / "analysis.json").read_text())


def test_loads_and_faithfulness_of_a_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", root / "rows.jsonl", "--faithfulness", 2, "--draws", 2, "--steps", 8)
    found = run(root, *words)
    shown = capsys.readouterr().out
    assert found["routing"]["samples"] == dict.fromkeys(
        ("CT", "MRI", "X-ray", "Pathology", "unlabelled"), 1
    ) | {"all": 5}
    assert found["routing"]["router"]["labelled"] == 4
    assert found["faithfulness"]["questions"] == 2
    images = [r for r in found["routing"]["loads"] if r["kind"] == "image"]
    assert all(r["tokens"] == 4 * found["routing"]["samples"][r["modality"]] for r in images)
    assert "CT, image" in shown and "Faithfulness" in shown and "Written: " in shown
    for name in ("loads.png", "router.png", "faithfulness.png"):
        with Image.open(root / "out" / name) as image:
            assert image.width > 600


def test_patches_of_padding_are_not_listed(found: Explanation) -> None:
    """Their attribution is zero, which is more than what speaks against an answer."""
    shown = np.array([[[True, False], [True, False]]])
    against = dataclasses.replace(found, shown=shown, attribution=np.where(shown, -1.5, 0.0))
    listed = [
        line
        for line in text.explanation(against).splitlines()
        if line.endswith("0 |") and ".." in line
    ]
    assert len(listed) == 2 and all("-1.500" in line for line in listed)


def test_one_question(root: Path) -> None:
    rows = ("--data", root / "rows.jsonl", "--question", "3", "--steps", 48, "--draws", 4)
    by_row = run(root, *rows)["explanation"]
    for name in ("overlay.png", "experts.png", "deletion.png"):
        with Image.open(root / "out" / name) as image:
            assert image.width > 600
    asked = ("--image", root / "images" / "i3.png", "--ask", QUESTION, "--steps", 48, "--draws", 4)
    assert run(root, *asked)["explanation"] == by_row
    assert "routing" not in run(root, *asked, "--method", "occlusion", "--answer", "no")
    assert "image" not in {t["kind"] for t in run(root, "--ask", "Why?")["explanation"]["tokens"]}


def test_rows_that_cannot_be_used(root: Path) -> None:
    broken = root / "images" / "broken.png"
    broken.write_bytes(b"no image")
    rows = [tiny_data.row(0), tiny_data.row(1) | {"image": "broken.png"}]
    file = tiny_data.save_rows(root / "broken.json", rows)
    with pytest.raises(DataError, match=r"(?s)1 of 2 .*broken.png.*--on-error skip"):
        run(root, "--data", file)
    skip = ("--data", file, "--on-error", "skip")
    found = run(root, *skip, "--faithfulness", 2, "--draws", 2, "--method", "occlusion")
    assert found["routing"]["samples"]["all"] == 1 and found["faithfulness"]["questions"] == 1
    assert [row["row"] for row in found["left_out"]] == [1]
    # More rows that are unusable at once than rows that are left to look at.
    tiny_data.save_rows(file, [*rows, {}, {}, {}])
    assert [row["row"] for row in run(root, *skip)["left_out"]] == [2, 3, 4, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--data MANIFEST, or --image F --ask TEXT"),
        (("--image", "a.png"), "--image needs --ask"),
        (("--data", "a.json", "--ask", "Why?", "--question", "0"), "not both"),
        (("--ask", "Why?", "--faithfulness", "3"), "--data MANIFEST"),
        (("--data", "a.json", "--answer", "yes"), "--answer belongs to one question"),
        (("--data", "a.json", "--limit", "-1"), "--limit is -1"),
        (("--ask", "Why?", "--draws", "0"), "draws is 0"),
    ],
)
def test_options_that_do_not_go_together(root: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(root, *words)


def test_without_matplotlib(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise MissingExtra("Figures need matplotlib")

    monkeypatch.setattr(plots, "need_matplotlib", absent)
    with pytest.raises(MissingExtra, match="matplotlib"):
        run(root, "--ask", "Why?")


def test_a_dense_model_has_explanations_but_no_loads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_service.save(tmp_path / "dense", tiny_service.config("stablelm"))
    words = ["--model-path", folder, "--data", root / "rows.jsonl"]
    command.analyse(command.arguments().parse_args([str(word) for word in words]))
    assert "no expert loads" in capsys.readouterr().out
    model = medmoe_jax.load(folder, bits=8)
    picture, how = root / "images" / "i0.png", Settings(method="occlusion", draws=2)
    found = explain.explain(model, QUESTION, picture, "no", how)
    assert found.experts is None and found.modality is None and found.attribution.all()
    assert "has no experts that" in text.explanation(found)
    with pytest.raises(ConfigError, match="use the method 'occlusion'"):
        explain.explain(model, QUESTION, picture, "no", SETTINGS)
