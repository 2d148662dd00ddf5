"""CLIP folders: where the vision tower comes from, its shapes and its image settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch_folders as folders  # noqa: E402
from hf_folders import CLIP_SIZES, ignored, make_clip, randomise  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from medmoe_jax.checkpoint import load_model, read_meta  # noqa: E402
from medmoe_jax.config import VisionConfig  # noqa: E402
from medmoe_jax.convert import ConversionError, to_jax, to_torch  # noqa: E402
from medmoe_jax.convert.configs import read_vision  # noqa: E402
from medmoe_jax.data.images import read_image_spec  # noqa: E402

MEAN, STD = [0.5, 0.25, 0.75], [0.1, 0.2, 0.3]  # not CLIP's


def test_clip_alone(tmp_path: Path) -> None:
    """Today's keys (without prefix), and back; transformers loads it."""
    model = make_clip(tmp_path / "src")
    to_jax(tmp_path / "src", tmp_path / "jax")
    params, meta = load_model(tmp_path / "jax")
    assert params.keys() == {"vision"} and meta.torch_config is None
    assert (tmp_path / "jax/preprocessor_config.json").is_file()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    config, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "torch")
    )
    assert config == written
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "torch").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_full_clip_model(tmp_path: Path) -> None:
    """The text side is left out with a reason, position buffers too; settings are nested."""
    text = CLIP_SIZES | {"vocab_size": 50, "projection_dim": 8, "bos_token_id": 1}
    text |= {"eos_token_id": 2}
    sizes = CLIP_SIZES | {"projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=8)
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src/model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "src/model.safetensors").unlink()
    folders.write_weights(tmp_path / "src", tensors, "bin")  # OpenAI's folders hold a .bin
    report = to_jax(tmp_path / "src", tmp_path / "jax")
    left_out = ignored(report)
    kept = [k for k in tensors if k.startswith("vision_model.") and "position_ids" not in k]
    assert report.converted == len(kept) and len(left_out) == len(tensors) - len(kept)
    assert len(report.ignored) == 2 and "text" in report.text()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "torch").eval()
    pixels = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        ours, theirs = again(pixels), model.vision_model(pixels)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_nested_clip_settings_have_their_defaults(tmp_path: Path) -> None:
    """transformers 4.37 leaves out what equals a default."""
    config = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}}
    theirs = transformers.CLIPVisionConfig()
    vision = read_vision(config, tmp_path)
    assert (vision.width, vision.layers, vision.heads, vision.ffn) == (768, 12, 12, 3072)
    assert (vision.image_size, vision.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (vision.activation, vision.norm_eps) == (theirs.hidden_act, theirs.layer_norm_eps)


def test_tower_inside_the_checkpoint(tmp_path: Path) -> None:
    """Used where no CLIP folder has weights; its heads come from a config.json, or by custom."""
    spec = folders.Spec(clip_width=512, clip_layers=1, clip_ffn=8)
    tensors = folders.write_official(tmp_path / "src", spec)
    shutil.rmtree(tmp_path / "src/clip")
    report = to_jax(tmp_path / "src", tmp_path / "guessed")
    assert "8 heads" in report.text() and "inside the checkpoint" in report.text()
    vision = read_meta(tmp_path / "guessed").model.vision
    assert (vision.image_size, vision.patch_size, vision.ffn, vision.layers) == (12, 4, 8, 1)
    folders.write_json(tmp_path / "clip/config.json", folders.clip_config(spec))
    to_jax(tmp_path / "src", tmp_path / "told", vision=tmp_path / "clip")
    meta = read_meta(tmp_path / "told")
    assert meta.model.vision.heads == 2 and meta.clip_config == folders.clip_config(spec)
    to_torch(tmp_path / "told", tmp_path / "torch")
    written = load_file(tmp_path / "torch/model.safetensors")
    assert all(torch.equal(written[k], tensors[k]) for k in tensors)
    config = json.loads((tmp_path / "torch/config.json").read_text())
    assert config["mm_image_tower"] == "./clip"


def test_clip_folder_takes_precedence(tmp_path: Path) -> None:
    """As in the official code; that the two differ is said."""
    spec = folders.Spec()
    folders.write_official(tmp_path / "src", spec)
    other = folders.random_tensors(folders.clip_shapes(spec), seed=77)
    folders.write_weights(tmp_path / "other", other)
    folders.write_json(tmp_path / "other/config.json", folders.clip_config(spec))
    report = to_jax(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "other")
    assert f"{len(other)} CLIP tensors inside the checkpoint differ" in report.text()
    params, _ = load_model(tmp_path / "jax")
    np.testing.assert_array_equal(
        params["vision"]["class_embedding"],
        other["vision_model.embeddings.class_embedding"].numpy(),
    )


@pytest.mark.parametrize("form", ["preprocessor", "processor", "no weights"])
def test_mean_and_deviation_of_the_image_settings(tmp_path: Path, form: str) -> None:
    """The tower normalises with what its own file says; that goes out again, file or no file."""
    folders.write_official(tmp_path / "src", folders.Spec())
    clip = tmp_path / "src/clip"
    settings = {"size": 12, "crop_size": 12, "image_mean": MEAN, "image_std": STD}
    if form == "processor":
        folders.write_json(clip / "processor_config.json", {"image_processor": settings})
    else:
        folders.write_json(clip / "preprocessor_config.json", settings)
    if form == "no weights":
        (clip / "model.safetensors").unlink()
    to_jax(tmp_path / "src", tmp_path / "jax")
    vision = read_meta(tmp_path / "jax").model.vision
    assert (vision.mean, vision.std) == (tuple(MEAN), tuple(STD))
    spec = read_image_spec(tmp_path / "jax/preprocessor_config.json", "pad")
    assert (spec.mean, spec.std) == (vision.mean, vision.std)
    (tmp_path / "jax/preprocessor_config.json").unlink()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    written = json.loads((tmp_path / "torch/clip/preprocessor_config.json").read_text())
    assert (written["image_mean"], written["image_std"]) == (MEAN, STD)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (clip, tmp_path / "torch/clip")
    )
    assert after == before
    to_jax(tmp_path / "torch", tmp_path / "again")
    assert read_meta(tmp_path / "again").model.vision == vision


@pytest.mark.parametrize("settings", [None, {"size": 12}, {"image_mean": None, "image_std": None}])
def test_mean_and_deviation_are_clips_where_none_are_given(
    tmp_path: Path, settings: dict | None
) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    if settings is not None:
        folders.write_json(tmp_path / "src/clip/preprocessor_config.json", settings)
    report = to_jax(tmp_path / "src", tmp_path / "jax")
    vision = read_meta(tmp_path / "jax").model.vision
    if settings is None:
        assert any("has no image settings" in note for note in report.notes)
        spec = read_image_spec(tmp_path / "jax/preprocessor_config.json", "pad")
        assert (spec.resize, spec.crop) == (vision.image_size, vision.image_size)
    theirs = transformers.CLIPImageProcessor()
    assert vision.mean == tuple(theirs.image_mean) == VisionConfig.mean
    assert vision.std == tuple(theirs.image_std) == VisionConfig.std


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mean", [0.5]),
        ("image_mean", 0.5),
        ("image_mean", ["a"] * 3),
        ("image_std", [1, 0, 1]),
    ],
)
def test_mean_and_deviation_that_cannot_be(tmp_path: Path, name: str, value: object) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    file = tmp_path / "src/clip/preprocessor_config.json"
    folders.write_json(file, {name: value})
    with pytest.raises(ConversionError) as error:
        to_jax(tmp_path / "src", tmp_path / "jax")
    assert str(error.value).startswith(f"{file}: {name} {value!r} is not three numbers")
    file.write_text("[")
    with pytest.raises(ConversionError, match="get the file again"):
        to_jax(tmp_path / "src", tmp_path / "jax")
