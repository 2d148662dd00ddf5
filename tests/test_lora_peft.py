"""Adapter folders of the library `peft`, both ways, against `peft` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import small_models
import tiny_runs
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import load_file, save_file

from medmoe_jax import checkpoint, lora
from medmoe_jax.config import LoraConfig, MoeConfig, RunConfig
from medmoe_jax.convert import ConversionError, to_torch, torch_reference
from medmoe_jax.convert.__main__ import main
from medmoe_jax.convert.peft import from_peft, to_peft
from medmoe_jax.models import medmoe

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # peft 0.21 asks transformers 5.23 for it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = np.random.default_rng(0).integers(1, 440, (2, 9))
MOE = MoeConfig(experts=3)


def jax_logits(params: Any, model: Any) -> np.ndarray:
    batch = {
        "tokens": IDS.astype(np.int32),
        "image_pos": np.full(IDS.shape, -1, np.int32),
        "mask": np.ones(IDS.shape, bool),
    }

    @jax.jit
    def run(params: Any) -> jax.Array:
        return medmoe.logits(params, medmoe.forward(params, model, batch)[0])

    return np.asarray(run(params))


def torch_logits(llm: Any) -> np.ndarray:
    with torch.no_grad():
        return llm(input_ids=torch.from_numpy(IDS)).logits.numpy()


def start(folder: Path, family: str) -> Any:
    """A model with experts in `folder`/base, and its language model in PyTorch."""
    tiny_runs.save_start(folder / "base", family, MOE)
    to_torch(folder / "base", folder / "torch")
    return torch_reference.load(folder / "torch").llm


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    """Every kind of module; the logits with `peft`'s adapters are those of the JAX model's."""
    llm = start(tmp_path, "phi")
    params, meta = checkpoint.load_model(tmp_path / "base")
    flat = flatten_dict(params, sep="/")
    settings = LoraConfig(rank=3, alpha=4.5, dropout=0.1)
    run = RunConfig(model=meta.model, train=("llm/.*",), lora=settings)
    adapters = small_models.fill(lora.shapes(run, flat), seed=1)
    known = lora.fingerprint(params)
    meta.delta = checkpoint.Delta(str(tmp_path / "base"), known, "paper", settings)
    checkpoint.save_model(tmp_path / "adapters", unflatten_dict(adapters, sep="/"), meta)
    assert main(["to-peft", str(tmp_path / "adapters"), str(tmp_path / "peft")]) == 0
    active = unflatten_dict(lora.active(flat | adapters, settings), sep="/")
    before, want = torch_logits(llm), jax_logits(active, meta.model)
    have = torch_logits(peft.PeftModel.from_pretrained(llm, str(tmp_path / "peft")))
    assert np.abs(have - before).max() > 0.1
    np.testing.assert_allclose(have, want, atol=1e-4)
    # And back again.
    args = ["from-peft", str(tmp_path / "peft"), str(tmp_path / "back")]
    assert main([*args, "--base", str(tmp_path / "base")]) == 0
    back = flatten_dict(checkpoint.read_params(tmp_path / "back"), sep="/")
    assert back.keys() == adapters.keys()
    for path, value in adapters.items():
        np.testing.assert_array_equal(back[path], value)
    delta = checkpoint.read_meta(tmp_path / "back").delta
    assert delta and delta.lora == LoraConfig(3, 4.5, 0.1, tuple(lora.TARGETS))


def made_by_peft(folder: Path, llm: Any) -> Any:
    """Adapters on some modules of some layers, with an effect; rank-stabilised."""
    torch.manual_seed(0)
    targets = r"model\.layers\.(0\.mlp\..*\.[02]\.up_proj|0\.mlp\.meta_moe.down_proj|1.*[qo]_proj)"
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(llm, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(str(folder))
    return wrapped


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    """Modules that it leaves out get nothing added; merged, the logits are `peft`'s."""
    llm = start(tmp_path, "stablelm")
    wrapped = made_by_peft(tmp_path / "peft", llm)
    report = from_peft(tmp_path / "peft", tmp_path / "adapters", tmp_path / "base")
    assert report.converted == 2 * (2 + 1 + 2)
    # Expert 1's up, and q and out of layer 0.
    assert report.notes == ["3 modules without an adapter got one that adds nothing"]
    params, meta = checkpoint.load_model(tmp_path / "adapters")
    np.testing.assert_allclose(torch_logits(wrapped), jax_logits(params, meta.model), atol=1e-4)
    base = checkpoint.load_model(tmp_path / "base")[0]
    experts = params["llm"]["moe"]["experts"]["up"]["kernel"]
    same = [
        np.array_equal(experts[0, e], base["llm"]["moe"]["experts"]["up"]["kernel"][0, e])
        for e in range(3)
    ]
    assert same == [False, True, False]

    # Errors, all of them at once.
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    key = next(key for key in sorted(tensors) if "lora_A" in key)
    tensors[key] = tensors[key][:2].clone()
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 16)
    del tensors[sorted(tensors)[-1]]
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as error:
        from_peft(tmp_path / "bad", tmp_path / "none", tmp_path / "base")
    for part in ("3 problems", "has shape [2, 16], [4, 16]", "lm_head", "is missing"):
        assert part in str(error.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only adapters without it"),
        ({"alpha_pattern": {"fc1": 3}}, "alpha_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 0}, "r is 0"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the model's own weights"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_settings_that_are_more_than_lora(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        from_peft(tmp_path, tmp_path / "out", tmp_path / "base")


def test_only_adapters_can_be_exported(tmp_path: Path) -> None:
    tiny_runs.save_start(tmp_path / "base")
    with pytest.raises(ConversionError, match="holds no adapters"):
        to_peft(tmp_path / "base", tmp_path / "out")
