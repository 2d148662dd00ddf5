"""Wrong, truncated and unknown files: one message with every problem, naming file, key, shapes."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_folders as folders  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from medmoe_jax.convert import ConversionError, to_jax, to_torch, torch_files  # noqa: E402
from medmoe_jax.convert.__main__ import main  # noqa: E402


def failure(tmp: Path, src: str = "src", **options: Any) -> str:
    """The message of a conversion that must fail, and that it wrote nothing."""
    with pytest.raises(ConversionError) as error:
        to_jax(tmp / src, tmp / "jax", **options)
    assert not (tmp / "jax").exists()
    return str(error.value)


def change_config(folder: Path, **changes: Any) -> None:
    """Sets fields of a config.json."""
    data = json.loads((folder / "config.json").read_text()) | changes
    folders.write_json(folder / "config.json", data)


def test_all_problems_at_once(tmp_path: Path) -> None:
    """A missing, an unknown, a misshapen key and a wrong dtype, in one message with the file."""
    tensors = folders.write_official(tmp_path / "src", folders.Spec())
    del tensors["model.layers.1.mlp.fc2.bias"]
    tensors["model.layers.1.mlp.fc3.bias"] = torch.ones(7)
    tensors["model.layers.2.mlp.fc1.weight"] = torch.ones(20, 23)
    tensors["lm_head.weight"] = torch.ones(50, 24, dtype=torch.float64)
    folders.write_weights(tmp_path / "src", tensors)
    message = failure(tmp_path)
    file = str(tmp_path / "src/model.safetensors")
    lines = message.splitlines()
    assert "4 problems" in lines[0] and len(lines) == 5
    assert all(file in line for line in lines[1:])
    for expected in (
        "'model.layers.1.mlp.fc2.bias' of shape [24] is missing",
        "'model.layers.1.mlp.fc3.bias' of shape [7] is not part of the model",
        "'model.layers.2.mlp.fc1.weight' has shape [20, 23], config.json asks for [20, 24]",
        "'lm_head.weight' has dtype float64; float32, float16, bfloat16 are read",
    ):
        assert sum(expected in line for line in lines) == 1, expected


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    change_config(tmp_path / "src", hidden_size=48, num_hidden_layers=9)
    lines = failure(tmp_path).splitlines()
    assert len(lines) == 42 and lines[-1].startswith("  - ... and ")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(), kind=kind)
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    file = tmp_path / "src" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    message = failure(tmp_path)
    assert str(file) in message and "truncated" in message and "again" in message


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        torch_files.Weights([file])


class Malicious:
    """Would write a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    tensors = folders.write_official(tmp_path / "src", folders.Spec(), kind="bin")
    file = tmp_path / "src/pytorch_model.bin"
    content = tensors | {"x": Malicious(tmp_path / "ran")}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    message = failure(tmp_path)
    assert str(file) in message and "never unpickled" in message
    assert "weights_only" not in message  # torch's own message advises to switch the check off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 3}, {1: torch.ones(1)}])
def test_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(), kind="bin")
    torch.save(content, tmp_path / "src/pytorch_model.bin")
    assert str(tmp_path / "src/pytorch_model.bin") in failure(tmp_path)


@pytest.mark.parametrize("name", ["../model-00002-of-00002.safetensors", "/etc/x.safetensors"])
def test_index_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(), shards=2)
    index = tmp_path / "src/model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(data))
    second = tmp_path / "src/model-00002-of-00002.safetensors"
    (tmp_path / second.name).write_bytes(second.read_bytes())
    message = failure(tmp_path)
    assert f"{index}: file {name!r} lies outside of the folder" in message


def test_index_that_does_not_fit(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(), shards=3)
    index = tmp_path / "src/model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["a.stranger"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(data))
    assert "key 'a.stranger' is in the index but not in the file" in failure(tmp_path)
    (tmp_path / "src/model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors' is missing" in failure(tmp_path)
    index.write_text("{}")
    assert "is not a weight index" in failure(tmp_path)


def test_same_key_in_two_shards(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(), shards=2)
    first, second = sorted((tmp_path / "src").glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    assert "is also in" in failure(tmp_path)


def test_aliases_must_be_equal(tmp_path: Path) -> None:
    """With use_residual a .bin holds the meta expert twice; two different ones are an error."""
    spec = folders.Spec(moe_layers=(0,), residual=True)
    tensors = folders.write_official(tmp_path / "src", spec, kind="bin")
    aliases = {k.replace("meta_moe", "mlp"): v for k, v in tensors.items() if "meta_moe" in k}
    key = "model.layers.0.mlp.mlp.fc1.weight"
    aliases[key] = aliases[key] + 1
    folders.write_weights(tmp_path / "src", tensors | aliases, "bin")
    message = failure(tmp_path)
    assert "1 problem" in message and key in message and key.replace("mlp.mlp", "mlp.meta_moe")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "moe_llava_qwen"}, "model_type 'moe_llava_qwen'"),
        ({"model_type": ["phi"]}, "model_type ['phi'] is not one that can be converted"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"vocab_size": None}, "'vocab_size'"),
        ({"num_attention_heads": 5}, "heads 5"),
        ({"num_attention_heads": 0}, "heads is 0; it must be a whole number, 1 or more"),
        ({"num_key_value_heads": "4"}, "kv_heads is '4'; it must be a whole number"),
        ({"partial_rotary_factor": "half"}, "'partial_rotary_factor' is 'half', not a number"),
        ({"partial_rotary_factor": 1.5}, "rotary_fraction is 1.5; it is a share"),
        ({"layer_norm_eps": [1e-5]}, "'layer_norm_eps' is [1e-05], not a number"),
        ({"layer_norm_eps": -1.0}, "norm_eps is -1.0; it must be a number, 0 or more"),
        ({"mm_vision_select_layer": "-2"}, "'mm_vision_select_layer' is '-2', not a number"),
        ({"image_projector_type": None}, "projector None is unknown"),
        ({"moe": ["sparse"]}, "'moe' is ['sparse'], not an object"),
        (
            {"moe": {"moe_enable": True, "num_experts": [2], "router_aux_loss_coef": None}},
            "'router_aux_loss_coef' is None, not a number",
        ),
        (
            {"moe": {"moe_enable": True, "num_experts": [2], "moe_layers_idx": 1}},
            "moe.moe_layers_idx is 1, not a list of layer numbers",
        ),
        ({"image_projector_type": "qformer4_36"}, "qformer4_36"),
        (
            {"moe": {"moe_enable": True, "num_experts": [3, 4]}},
            "moe.num_experts is [3, 4]: layers with different numbers of experts cannot be "
            "converted, since their weights are stacked; use a checkpoint",
        ),
        ({"moe": {"moe_enable": True}}, "moe.num_experts is [None], not a whole number"),
        (
            {"moe": {"moe_enable": True, "num_experts": [2], "moe_layers_idx": [7]}},
            "placement '7'",
        ),
    ],
)
def test_configurations_that_cannot_work(tmp_path: Path, changes: Any, expected: str) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    change_config(tmp_path / "src", **changes)
    message = failure(tmp_path)
    assert expected in message and str(tmp_path / "src/config.json") in message


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    (tmp_path / "src/config.json").write_text("{")
    assert str(tmp_path / "src/config.json") in failure(tmp_path)


def test_missing_parts(tmp_path: Path) -> None:
    """Each says what to give, and with which option."""
    assert "does not exist" in failure(tmp_path, "nothing")
    spec = folders.Spec()
    folders.write_official(tmp_path / "src", spec)
    (tmp_path / "src/clip/config.json").unlink()
    message = failure(tmp_path)  # heads of a small tower cannot be told
    assert "--vision" in message and "width 16" in message
    (tmp_path / "src/model.safetensors").unlink()
    assert "holds no weights" in failure(tmp_path)
    torch.save(
        folders.random_tensors(folders.projector_shapes(spec)), tmp_path / "src/mm_projector.bin"
    )
    message = failure(tmp_path)
    assert "2 problems" in message and "--llm" in message and "--vision" in message


def test_tower_path_does_not_leave_the_folder(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec(clip_width=512))
    (tmp_path / "src/clip").rename(tmp_path / "clip")
    change_config(tmp_path / "src", mm_image_tower="../clip")
    report = to_jax(tmp_path / "src", tmp_path / "jax")
    assert "inside the checkpoint" in report.text()


def test_parts_that_do_not_go_together(tmp_path: Path) -> None:
    spec = folders.Spec(moe_layers=(0, 2), experts=3)
    folders.write_official(tmp_path / "src", spec)
    torch.save(folders.router(spec.width, 4), tmp_path / "router.pth")
    message = failure(tmp_path, router=tmp_path / "router.pth")
    assert "4 outputs" in message and "3 experts" in message
    torch.save(folders.router(23, 3), tmp_path / "narrow.pth")
    assert "[3, 23]" in failure(tmp_path, router=tmp_path / "narrow.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    assert "is not a router" in failure(tmp_path, router=tmp_path / "other.pth")
    assert "is not a router" in failure(tmp_path, "other.pth")
    assert "--vision does not go" in failure(tmp_path, "router.pth", vision=tmp_path / "src")
    assert "--llm goes with a stage-1" in failure(tmp_path, llm=tmp_path / "src")
    assert "no projector" in failure(tmp_path, projector=tmp_path / "router.pth")
    assert "does not exist" in failure(tmp_path, projector=tmp_path / "none.bin")
    assert "no tokenizer files" in failure(tmp_path, tokenizer=tmp_path)
    assert "not CLIP's" in failure(tmp_path, vision=tmp_path / "src")


def test_layouts_that_cannot_hold_the_model(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "moe", folders.Spec(moe_layers=(0,)))
    to_jax(tmp_path / "moe", tmp_path / "jax")
    with pytest.raises(ConversionError, match="no plain Hugging Face form"):
        to_torch(tmp_path / "jax", tmp_path / "out", layout="hf")
    to_jax(tmp_path / "moe/clip", tmp_path / "clip")
    with pytest.raises(ConversionError, match="has no projector, llm"):
        to_torch(tmp_path / "clip", tmp_path / "out", layout="official")
    with pytest.raises(ConversionError, match="dtype 'float64' is unknown"):
        to_torch(tmp_path / "clip", tmp_path / "out", dtype="float64")
    assert not (tmp_path / "out").exists()


def test_numbers_too_large_for_float16(tmp_path: Path) -> None:
    tensors = folders.write_official(tmp_path / "src", folders.Spec())
    tensors["model.layers.3.mlp.fc1.bias"][2] = 1e5
    folders.write_weights(tmp_path / "src", tensors)
    to_jax(tmp_path / "src", tmp_path / "jax")
    with pytest.raises(ConversionError, match=r"model\.layers\.3\.mlp\.fc1\.bias.*--dtype"):
        to_torch(tmp_path / "jax", tmp_path / "out", dtype="float16")
    to_torch(tmp_path / "jax", tmp_path / "out", dtype="bfloat16")  # nothing is in its way


def test_what_was_stopped_can_be_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    words = ["to-jax", str(tmp_path / "src"), str(tmp_path / "jax")]
    for stop in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(folder: Path, *_: Any, stop: BaseException = stop) -> None:
            (folder / "params").mkdir()
            raise stop

        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["medmoe_jax.convert.to_jax"], "save_model", fail)
            if isinstance(stop, OSError):
                assert main(words) == 1
                assert "error: [Errno 28] No space left" in capsys.readouterr().err
            else:
                with pytest.raises(KeyboardInterrupt):
                    main(words)
        assert not (tmp_path / "jax").exists()
    assert main(words) == 0


def test_destination_is_not_overwritten(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    (tmp_path / "dst").mkdir()
    to_jax(tmp_path / "src", tmp_path / "dst")  # an empty folder is fine
    with pytest.raises(ConversionError, match="exists already"):
        to_jax(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(ConversionError, match="exists already"):
        to_torch(tmp_path / "dst", tmp_path / "src")
    with pytest.raises(ConversionError, match="model folder of this project already"):
        to_jax(tmp_path / "dst", tmp_path / "again")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = folders.Spec(moe_layers=(0, 2), top_k=2)
    tensors = folders.write_official(tmp_path / "src", spec)
    assert main(["to-jax", str(tmp_path / "src"), str(tmp_path / "jax")]) == 0
    out = capsys.readouterr().out
    total = sum(t.numel() for t in tensors.values())
    assert "stage3 (top-2 of 3 experts in layers 0,2)" in out and f"{total:,}" in out
    assert "ignored" in out and "CLIP folder" in out and "no tokenizer" in out
    command = ["to-torch", str(tmp_path / "jax"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "exists already" in captured.err
    assert main(["to-torch", str(tmp_path / "src"), str(tmp_path / "x")]) == 1
    assert "to-jax" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["to-jax", str(tmp_path / "src")])


def test_unknown_float_dtype(tmp_path: Path) -> None:
    """Eight-bit floats are named in the message, not tripped over."""
    tensors = folders.write_official(tmp_path / "src", folders.Spec())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "src/model.safetensors")
    message = failure(tmp_path)
    assert "'lm_head.weight' has dtype F8_E4M3" in message
