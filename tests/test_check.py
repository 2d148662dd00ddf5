"""`convert check`: the whole model equals PyTorch, and whatever differs is found."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

from medmoe_jax.convert import ConversionError, check, comparison, to_jax
from medmoe_jax.convert.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_compile")

# Folders unlike the goldens; what is not said is the default of `random_checkpoint.Spec`. The
# batches are small and the seeds chosen so that one of the first tries is far from ties.
SMALL = {"new_tokens": 4, "text": 5}
RANDOM = {
    "two experts, first_half, residual": {
        "moe_layers": (0,),
        "experts": 2,
        "use_residual": True,
        "images": (1, 0),
        "projector": "linear",
        "select_layer": -1,
        "dtype": "bfloat16",
        "clip_dtype": "float16",
    },
    "six experts, top-2, a list of layers": {
        "family": "stablelm",
        "layers": 5,
        "moe_layers": (0, 1, 4),
        "experts": 6,
        "top_k": 2,
        "kv_heads": 1,
        "qkv_bias": False,
        "projector": "mlp3x_gelu",
        "images": (1, 0, 1),
        "shards": 2,
        "seed": 3,
    },
    "three experts, top-2, residual, second_half": {
        "family": "stablelm",
        "layers": 4,
        "moe_layers": (2, 3),
        "top_k": 2,
        "use_residual": True,
        "images": (0, 2),
        "select_layer": 1,
        "dtype": "float16",
    },
    "every layer, no grouped queries": {"moe_layers": (0, 1, 2), "kv_heads": 4, "images": (2, 0)},
    "dense, grouped queries": {"moe_layers": (), "select_layer": -3, "images": (1, 3)},
}


@pytest.fixture(scope="module")
def result(fixtures: Path) -> comparison.Result:
    """The comparison of one golden folder."""
    folder = fixtures / "phi_top1"
    return check.check(folder, folder / "io.safetensors")


@pytest.fixture(scope="module")
def arrays(fixtures: Path) -> dict[str, np.ndarray]:
    """The activation file of the same folder."""
    return load_file(fixtures / "phi_top1/io.safetensors")


def assert_whole(result: comparison.Result, file: Path) -> None:
    """All results of the file are compared and pass, with 10 times less error than allowed."""
    assert result.ok, result.text()
    assert not result.unchecked
    results = {k for k in load_file(file) if comparison.RESULTS.fullmatch(k)}
    generated = {k for k in load_file(file) if comparison.GENERATED.fullmatch(k)}
    assert {row.name.split(" ")[0] for row in result.rows} == results | generated
    assert max(row.error for row in result.rows) < 5e-5, result.text()


@pytest.mark.parametrize("name", small_models.GOLDEN_MOE[1:] + small_models.GOLDEN_DENSE)
def test_goldens(fixtures: Path, name: str) -> None:
    file = fixtures / name / "io.safetensors"
    params, cfg = small_models.golden_params(fixtures / name)
    want = load_file(file)
    got = check.activations(params, cfg, want, name) | check.generations(params, cfg, want, name)
    assert_whole(comparison.compare(got, want, 1e-4), file)


def test_golden_folder_and_its_conversion(
    fixtures: Path, result: comparison.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fixtures / "phi_top1/io.safetensors"
    assert_whole(result, file)
    to_jax(fixtures / "phi_top1", tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--io", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("PASS: 35 comparisons")
    row = next(line.split() for line in lines if line.startswith("out.logits "))
    assert row[1] == "4x31x256" and float(row[2]) < 1e-4 and row[3:] == ["1e-04", "ok"]


@pytest.mark.parametrize("name", RANDOM)
def test_random_folders(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")
    import random_checkpoint
    import torch

    torch.set_num_threads(1)  # threads that wait for one another would be most of the time
    folder = random_checkpoint.write(tmp_path, random_checkpoint.Spec(**SMALL, **RANDOM[name]))
    file = folder / "io.safetensors"
    assert_whole(check.check(folder, file), file)


def test_other_weights_fail(
    fixtures: Path, result: comparison.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One changed number in a deep layer: found, and the exit status says so."""
    folder = tmp_path / "phi_top1"
    shutil.copytree(fixtures / "phi_top1", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.meta_moe.fc2.bias"][3] += 0.01
    save_file(weights, folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    file = fixtures / "phi_top1/io.safetensors"
    assert main(["check", str(folder), "--io", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdict = {line.split()[0]: "FAIL" in line for line in lines[1:-1]}
    assert not verdict["out.layer_01.hidden"] and not verdict["out.layer_02.moe_in"]
    assert verdict["out.layer_02.moe_out"] and verdict["out.logits"]
    assert verdict["gen.text.step_logits"]
    assert lines[-1].startswith("FAIL: ") and "first out.layer_02.moe_out" in lines[-1]
    assert main(["check", str(folder), "--io", str(file), "--atol", "10"]) == 0


def test_what_must_be_equal(arrays: dict[str, np.ndarray]) -> None:
    """Counts, choices, ids, masks and labels: one place that differs fails at any tolerance."""
    got = {k: v.copy() for k, v in arrays.items() if k.startswith(("out.", "gen."))}
    assert comparison.compare(got, arrays, 1e-4).ok
    wrong = got | {"out.layer_00.combine_dense": np.roll(got["out.layer_00.combine_dense"], 1, 1)}
    for key in ("out.layer_02.exp_counts", "gen.text.new_ids", "out.merged_labels"):
        wrong[key] = got[key] + (np.arange(got[key].size).reshape(got[key].shape) == 0)
    failed = {row.name for row in comparison.compare(wrong, arrays, 1e9).rows if not row.ok}
    assert failed == {
        "out.layer_00.combine_dense (experts chosen)",
        "out.layer_02.exp_counts",
        "gen.text.new_ids",
        "out.merged_labels",
    }


def test_nothing_passes_silently(arrays: dict[str, np.ndarray]) -> None:
    some = {k: arrays[k] for k in ("out.loss", "out.logits")}
    more = some | {"out.layer_07.hidden": np.zeros((2, 2)), "out.mystery": np.zeros(3)}
    done = comparison.compare(some, more | {"input_ids": np.zeros(2)}, 1e-4)
    assert not done.ok and done.unchecked == ["out.mystery"]
    absent = done.rows[-1]
    assert (absent.name, absent.error) == ("out.layer_07.hidden", math.inf)
    assert "no such tensor" in done.text() and "out.mystery" in done.text()
    assert "1 not checked" in done.text().splitlines()[-1]
    nan = comparison.compare(some | {"out.loss": np.float32(np.nan)}, some, 1e-4)
    assert [row.name for row in nan.rows if not row.ok] == ["out.loss"]
    shape = comparison.compare(some | {"out.logits": np.zeros((1, 2))}, some, 1e9)
    assert not shape.ok and "the model gives shape (1, 2)" in shape.text()
    empty = comparison.compare({}, {"input_ids": np.zeros(2)}, 1e-4)
    assert not empty.ok and "nothing to compare" in empty.text()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("input_ids", "key 'input_ids' is missing"),
        ("labels", "key 'labels' is missing: the losses"),
        ("pixel_values", "key 'pixel_values' is missing: it needs one image for every image token"),
        ("gen.image.pixel_values", "key 'gen.image.pixel_values' is missing"),
        ("gen.text.input_ids", "key 'gen.text.input_ids' is missing"),
        ("gen.image.eos_stop_id", "key 'gen.image.eos_stop_id' is missing"),
    ],
)
def test_missing_inputs(
    fixtures: Path, arrays: dict[str, np.ndarray], drop: str, message: str
) -> None:
    params, cfg = small_models.golden_params(fixtures / "phi_top1")
    left = {k: v for k, v in arrays.items() if k != drop}
    with pytest.raises(ConversionError, match=rf"^FILE: {message}.*write it into the file"):
        run = check.generations if drop.startswith("gen.") else check.activations
        run(params, cfg, left, "FILE")


def test_inputs_of_another_model(fixtures: Path, arrays: dict[str, np.ndarray]) -> None:
    params, cfg = small_models.golden_params(fixtures / "phi_top1")
    for key, value, message in (
        ("input_ids", arrays["input_ids"] + 5000, "token id 5.* vocabulary of 256"),
        ("pixel_values", arrays["pixel_values"][:2], "pixel_values has shape"),
        ("pixel_values", np.zeros((5, 3, 8, 8), np.float32), "pixel_values has shape"),
    ):
        with pytest.raises(ConversionError, match=rf"FILE: .*{message}.*another model"):
            check.activations(params, cfg, arrays | {key: value}, "FILE")
    with pytest.raises(ConversionError, match=r"one prompt \[1, S\]"):
        two = arrays | {"gen.text.input_ids": np.ones((2, 4), int)}
        check.generations(params, cfg, two, "FILE")


def test_unreadable(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "io.safetensors").write_bytes(b"nothing")
    for io in (tmp_path / "io.safetensors", tmp_path / "absent.safetensors"):
        assert main(["check", str(fixtures / "phi_top1"), "--io", str(io)]) == 1
        assert f"{io}: cannot be read" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"format": "medmoe_jax", "version": 1}))
    assert main(["check", str(tmp_path), "--io", str(tmp_path / "io.safetensors")]) == 1
    assert "config.json" in capsys.readouterr().err
