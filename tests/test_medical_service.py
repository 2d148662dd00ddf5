"""Medical files in the commands: views, warnings about the modality, and nothing of a patient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import tiny_service
from PIL import Image
from test_medical_dicom import FILES, SECRET, ramp, save

import medmoe_jax
from medmoe_jax.config import MODALITIES, DataConfig, MoeConfig, ViewConfig
from medmoe_jax.data import images, pipeline, tokens
from medmoe_jax.data.check import load_samples
from medmoe_jax.data.images import ImageSpec, load_image, open_image
from medmoe_jax.data.prepare.pictures import Store
from medmoe_jax.data.prepare.types import Picture
from medmoe_jax.data.problems import DataError
from medmoe_jax.responder import mismatch

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a file whose tag the router contradicts."""
    root = tmp_path_factory.mktemp("medical")
    tiny_service.save(root / "model", tiny_service.config("phi", MoeConfig()))
    (root / "images").mkdir()
    (root / "images" / "ct").write_bytes((FILES / "CT_small.dcm").read_bytes())
    for tag in ("CT", "MR", "CR", "SM", "US", "OT"):
        save(root / "images" / f"{tag}.dcm", ramp(), Modality=tag)
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> medmoe_jax.Model:
    return medmoe_jax.load(root / "model", view=ViewConfig(window="lung"))


def test_the_view_reaches_the_model(root: Path, model: medmoe_jax.Model) -> None:
    shown = model.pixels(root / "images" / "ct")[0]
    np.testing.assert_array_equal(shown, load_image(root / "images" / "ct", model.spec))
    assert (shown != medmoe_jax.load(root / "model").pixels(root / "images" / "ct")[0]).any()


def test_a_mismatch_is_a_warning(root: Path, model: medmoe_jax.Model) -> None:
    """The warning is there exactly where the router's first choice is not the tag's."""
    names = {"CT": "CT", "MR": "MRI", "CR": "X-ray", "SM": "Pathology", "US": "ultrasound"}
    how = medmoe_jax.Sampling(max_new_tokens=2)
    files = [root / "images" / f"{tag}.dcm" for tag in [*names, "OT"]]
    replies = model.generate(["What?"] * len(files), files, how)
    for name, reply in zip(names.values(), replies, strict=False):
        router = max(reply.modality, key=reply.modality.get)
        assert bool(reply.warnings) == (router != name)
        if reply.warnings:
            said = f"the file's Modality tag says {name}, the router takes it for {router}"
            assert reply.warnings[0].startswith(said)
    assert replies[4].warnings and not replies[5].warnings
    chat = model.chat(how)
    for _ in range(2):  # the image stays that of the next question
        assert chat.ask("What?", files[4]).warnings == replies[4].warnings
        files[4] = None
    # A question that was refused has shown nothing.
    with pytest.raises(DataError, match="positions"):
        chat.ask("What? " * 2000, files[5])
    assert chat.ask("What?").warnings == replies[4].warnings
    chat.reset()
    assert chat.ask("What?").warnings == ()


def test_mismatch() -> None:
    sure = dict(zip(MODALITIES, (0.1, 0.7, 0.1, 0.1), strict=True))
    assert mismatch(("MRI",), sure) == mismatch((), sure) == mismatch(("CT", "MRI"), sure) == ()
    text = "the file's Modality tag says CT, the router takes it for MRI (70%)"
    assert mismatch(("CT",), sure) == (text,)
    assert mismatch(("CT",), None) == mismatch(("CT",), {"expert 0": 1.0}) == ()


def test_nothing_of_a_patient_is_written(root: Path, tmp_path: Path) -> None:
    """Predict and chat with good and broken files: no output, message or file has the name."""
    whole = (root / "images" / "CT.dcm").read_bytes()
    assert SECRET.encode() in whole
    (root / "images" / "cut.dcm").write_bytes(whole[:-99])
    rows = [
        {"id": i, "image": name, "text": "What?"} for i, name in enumerate(["US.dcm", "cut.dcm"])
    ]
    tiny_data.save_rows(root / "q.jsonl", rows)
    out = tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "medmoe_jax.predict", "--model-path", root / "model"]
    words += ["--question-file", root / "q.jsonl", "--image-folder", root / "images"]
    words += ["--answers-file", out, "--max-new-tokens", "2", "--window", "bone"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert "says ultrasound" in answers[0]["metadata"]["warnings"][0]
    assert "warning: 0: the file's Modality tag says ultrasound" in done.stderr
    assert "missing, truncated or broken" in answers[1]["metadata"]["error"]
    said = done.stdout + done.stderr + out.read_text()
    words = [sys.executable, "-m", "medmoe_jax.chat", "--model-path", root / "model"]
    words += ["--image", root / "images" / "US.dcm", "--max-new-tokens", "2"]
    lines = f"What?\n/image {root / 'images' / 'cut.dcm'}\n/save {tmp_path / 'turns.json'}\n"
    done = subprocess.run(words, input=lines, capture_output=True, text=True, check=False)
    assert "warning: the file's Modality tag says ultrasound" in done.stdout, done.stderr
    said += done.stdout + done.stderr + (tmp_path / "turns.json").read_text()
    assert "Zyx" not in said and "Quentin" not in said and "4711" not in said
    assert (
        "says ultrasound"
        in json.loads((tmp_path / "turns.json").read_text())["turns"][0]["warnings"][0]
    )


def test_preparation_renders_the_view(root: Path, tmp_path: Path) -> None:
    view = ViewConfig(window="lung")
    with Store(tmp_path, 1, view) as store:
        picture = Picture("ct", file=root / "images" / "CT.dcm")
        store.start(picture)
        name = store.name(picture)
    with Image.open(tmp_path / name) as made:
        assert made.format == "PNG" and SECRET.encode() not in (tmp_path / name).read_bytes()
        expected = open_image(root / "images" / "CT.dcm", view)
        np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))
    assert (np.asarray(expected) != np.asarray(open_image(root / "images" / "CT.dcm"))).any()


def test_training_reads_the_view(root: Path, tmp_path: Path) -> None:
    """Through the data config, the check of rows and the pipeline."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a lung"}]
    file = tiny_data.save_rows(
        tmp_path / "a.json", [{"id": 1, "image": "ct", "conversations": talk}]
    )
    cfg = DataConfig((str(file),), image_folder=str(root / "images"), max_length=256)
    cfg.view.window = "lung"
    tokenizer = tokens.load_tokenizer(root / "model" / "tokenizer", "phi")
    spec = images.read_image_spec(root / "model" / "preprocessor_config.json", "pad", cfg.view)
    samples = load_samples(cfg.files, cfg, tokenizer, 4).samples
    batch = next(iter(pipeline.build(samples, tokenizer, spec, 4, cfg, 1, 0, train=False)))
    lung = ImageSpec(spec.crop, spec.crop, view=ViewConfig(window="lung"))
    expected = load_image(root / "images" / "ct", lung)
    np.testing.assert_array_equal(np.asarray(batch["images"]).reshape(expected.shape), expected)
