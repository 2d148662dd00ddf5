"""The PyTorch reference equals the official goldens, and refuses folders that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")

import torch
from random_checkpoint import Spec, write
from safetensors.torch import load_file, save_file

from medmoe_jax.convert import torch_reference
from medmoe_jax.convert.torch_model import MedMoe

FOLDERS = [f"{f}_{m}" for f in ("phi", "stablelm") for m in ("top1", "top2", "dense_stage2")]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder unlike the goldens: grouped queries, three experts, use_residual, two shards."""
    spec = Spec(top_k=2, use_residual=True, clip_heads=1, images=(0, 2), shards=2)
    return write(tmp_path_factory.mktemp("odd"), spec)


def run(model: MedMoe, io: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return model(io["input_ids"], io["attention_mask"], io["labels"], io["pixel_values"])


def assert_equal_outputs(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """All out.* tensors: same names, shapes and dtypes; counts, masks and routing exactly."""
    want = {k: v for k, v in want.items() if k.startswith("out.")}
    assert got.keys() == want.keys()
    for name, value in want.items():
        exact = not value.is_floating_point()
        limit = 0.0 if exact else TOLERANCE
        torch.testing.assert_close(
            got[name], value, atol=limit, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name.endswith("combine_dense"):
            assert torch.equal(got[name] > 0, value > 0), name


def assert_equal_generation(model: MedMoe, io: dict[str, torch.Tensor]) -> None:
    for kind in ("image", "text"):
        pixel_values = io.get(f"gen.{kind}.pixel_values")
        want = io[f"gen.{kind}.new_ids"]
        ids, logits = model.generate_greedy(io[f"gen.{kind}.input_ids"], pixel_values, len(want))
        assert ids.tolist() == want.tolist()
        torch.testing.assert_close(logits, io[f"gen.{kind}.step_logits"], atol=TOLERANCE, rtol=0)
    ids, _ = model.generate_greedy(
        io["gen.image.input_ids"],
        io["gen.image.pixel_values"],
        eos_id=int(io["gen.image.eos_stop_id"]),
    )
    assert ids.tolist() == io["gen.image.new_ids_eos_stop"].tolist()


@pytest.mark.parametrize("name", FOLDERS)
def test_goldens(fixtures: Path, name: str) -> None:
    model = torch_reference.load(fixtures / name)
    io = load_file(fixtures / name / "io.safetensors")
    out = run(model, io)
    assert_equal_outputs(out, io)
    assert_equal_generation(model, io)
    out["out.loss"].backward()
    gradients = {f"grad.{k}": p.grad for k, p in model.llm.named_parameters()}
    train = load_file(fixtures / name / "train_io.safetensors")
    assert out["out.loss"].item() == pytest.approx(train["losses"][0].item(), abs=TOLERANCE)
    for key in [k for k in train if k.startswith("grad.")]:
        torch.testing.assert_close(gradients[key], train[key], atol=TOLERANCE, rtol=0)
    assert all(p.grad is None for p in model.clip.parameters())


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_upcycled_goldens(fixtures: Path, family: str, top_k: int) -> None:
    """Experts and meta expert that are copies of the dense MLP, one router for all layers."""
    folder = fixtures / f"{family}_dense_stage2"
    config = json.loads((folder / "config.json").read_text())
    layers = list(range(0, config["num_hidden_layers"], 2))
    router = torch.load(folder / "router.pth", weights_only=True)
    tensors = torch_reference.read_tensors(folder)
    for i in layers:
        mlp = f"model.layers.{i}.mlp."
        for key in [k for k in tensors if k.startswith(mlp)]:
            value, leaf = tensors.pop(key), key.removeprefix(mlp)
            tensors[f"{mlp}meta_moe.{leaf}"] = value
            for e in range(4):
                tensors[f"{mlp}deepspeed_moe.experts.deepspeed_experts.{e}.{leaf}"] = value
        for leaf in ("weight", "bias"):
            tensors[f"{mlp}deepspeed_moe.gate.wg.{leaf}"] = router[f"fc1.{leaf}"]
    config["moe"] = {
        "moe_layers_idx": layers,
        "num_experts": [4],
        "top_k_experts": top_k,
        "use_residual": False,
        "router_aux_loss_coef": 0.01,
    }
    clip_config = json.loads((folder / "clip/config.json").read_text())
    clip = torch_reference.read_tensors(folder / "clip")
    model = torch_reference.build(config, tensors, clip_config, clip)
    io = load_file(folder / "io.safetensors")
    want = load_file(folder / f"upcycled_top{top_k}_io.safetensors")
    images = int((io["input_ids"][:2] == -200).sum(1).clamp(min=1).sum())
    two_rows = {k: io[k][:2] for k in ("input_ids", "attention_mask", "labels")}
    out = run(model, two_rows | {"pixel_values": io["pixel_values"][:images]})
    for name, value in want.items():
        torch.testing.assert_close(out[name], value, atol=TOLERANCE, rtol=0)


def test_random_folder_is_its_own_golden(odd: Path) -> None:
    model = torch_reference.load(odd)
    io = load_file(odd / "io.safetensors")
    assert_equal_outputs(run(model, io), io)
    assert_equal_generation(model, io)
    for layer in (0, 2):
        assert (io[f"out.layer_{layer:02}.exp_counts"] > 0).all()


def test_use_residual_and_top2_token_by_token(odd: Path) -> None:
    """The MoE layer once more, from the equation, one token at a time."""
    tensors = torch_reference.read_tensors(odd)
    io = load_file(odd / "io.safetensors")
    at = "model.layers.2.mlp."

    def linear(key: str, x: torch.Tensor) -> torch.Tensor:
        return tensors[f"{at}{key}.weight"] @ x + tensors[f"{at}{key}.bias"]

    def mlp(key: str, x: torch.Tensor) -> torch.Tensor:
        gelu = torch.nn.functional.gelu(linear(f"{key}.fc1", x), approximate="tanh")
        return linear(f"{key}.fc2", gelu)

    rows, want = io["out.layer_02.moe_in"][1], io["out.layer_02.moe_out"][1]
    for x, y in zip(rows[:6], want[:6], strict=True):
        share = linear("deepspeed_moe.gate.wg", x).softmax(0)
        a, b = share.argsort(descending=True)[:2].tolist()
        experts = [mlp(f"deepspeed_moe.experts.deepspeed_experts.{e}", x) for e in (a, b)]
        routed = (share[a] * experts[0] + share[b] * experts[1]) / (share[a] + share[b])
        c0, c1 = linear("coefficient", x).softmax(0)
        meta = mlp("meta_moe", x)
        torch.testing.assert_close(c0 * routed + c1 * meta + meta, y, atol=1e-5, rtol=0)


def test_same_model_from_every_file_form(odd: Path, tmp_path: Path) -> None:
    io = load_file(odd / "io.safetensors")
    want = run(torch_reference.load(odd), io)["out.logits"]
    shutil.copy(odd / "config.json", tmp_path)
    shutil.copy(odd / "pytorch_model.bin", tmp_path)  # has the aliases of use_residual
    # Neither mm_image_tower nor `vision`: CLIP from inside the checkpoint.
    assert torch.equal(run(torch_reference.load(tmp_path), io)["out.logits"], want)
    other = tmp_path / "other"
    shutil.copytree(odd / "clip", other)
    key = "vision_model.embeddings.class_embedding"
    clip = load_file(other / "model.safetensors")
    model = torch_reference.load(tmp_path, vision=other)
    assert torch.equal(run(model, io)["out.logits"], want)
    # The folder's weights count, not the copy in the checkpoint; text parts are ignored.
    clip |= {key: 2 * clip[key], "text_model.x": clip[key], "logit_scale": torch.ones(())}
    save_file(clip, other / "model.safetensors")
    changed = run(torch_reference.load(tmp_path, vision=other), io)["out.logits"]
    assert not torch.allclose(changed, want, atol=1e-3)


def test_strict(odd: Path) -> None:
    config = json.loads((odd / "config.json").read_text())
    clip_config = json.loads((odd / "clip/config.json").read_text())
    tensors = torch_reference.read_tensors(odd)
    clip = torch_reference.read_tensors(odd / "clip")
    gate = "model.layers.0.mlp.deepspeed_moe.gate.wg.bias"
    tower = torch_reference.TOWER + "vision_model.post_layernorm.bias"
    meta = "model.layers.0.mlp.meta_moe.fc1.bias"
    cases = {
        f"missing {gate}": {k: v for k, v in tensors.items() if k != gate},
        "unexpected lm_head.bias": tensors | {"lm_head.bias": torch.zeros(3)},
        rf"{gate} has shape \[5\], the config asks for \[3\]": tensors | {gate: torch.zeros(5)},
        "missing post_layernorm.bias": {k: v for k, v in tensors.items() if k != tower},
        "must equal": tensors | {meta.replace("meta_moe", "mlp"): tensors[meta] + 1},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=f"(?s)FOLDER.*{message}"):
            torch_reference.build(config, wrong, clip_config, clip, "FOLDER")
    with pytest.raises(ValueError, match=r"CLIP of FOLDER: unexpected encoder\.x"):
        wrong = clip | {"encoder.x": torch.zeros(1)}
        torch_reference.build(config, tensors, clip_config, wrong, "FOLDER")


def test_missing_files(odd: Path, tmp_path: Path) -> None:
    shutil.copy(odd / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        torch_reference.load(tmp_path)
    tensors = torch_reference.read_tensors(odd)
    own = {k: v for k, v in tensors.items() if not k.startswith(torch_reference.TOWER)}
    save_file(own, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="CLIP is neither"):
        torch_reference.load(tmp_path)


def test_merge_truncates_and_pads_on_either_side(odd: Path) -> None:
    model = torch_reference.load(odd)
    n, width = 9, 32
    ids = torch.tensor([[5, -200, 6], [7, 8, 9]])
    keep = torch.tensor([[True, True, True], [True, True, False]])
    labels = torch.tensor([[-100, -100, 6], [-100, 8, -100]])
    features = torch.arange(2.0 * n * width).view(2, n, width) + 1
    embeds, mask, marks = model.merge(ids, keep, labels, features)
    words = model.llm.model.embed_tokens.weight
    assert torch.equal(embeds[0], torch.cat([words[5:6], features[0], words[6:7]]))
    assert torch.equal(embeds[1, :2], words[7:9]) and not embeds[1, 2:].any()
    assert marks.tolist() == [[-100] * 10 + [6], [-100, 8] + [-100] * 9]
    assert mask.sum(1).tolist() == [11, 2] and mask[:, :2].all()
    model.config |= {"tokenizer_padding_side": "left", "tokenizer_model_max_length": 4}
    embeds, mask, marks = model.merge(ids, keep, labels, features)
    assert marks.tolist() == [[-100] * 4, [-100, -100, -100, 8]]
    assert mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert torch.equal(embeds[0, 1:], features[0, :3]) and not embeds[1, :2].any()
    with pytest.raises(ValueError, match=r"2 images for rows of \[1\]"):
        model.merge(ids[:1], keep[:1], labels[:1], features)
