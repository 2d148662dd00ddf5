"""What config.json files say after a model has changed, or where none was stored."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from medmoe_jax import presets
from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.config import ModelConfig, MoeConfig
from medmoe_jax.convert.configs import read_llm, read_moe, read_vision
from medmoe_jax.convert.export_configs import clip_config, official_config, plain_config
from medmoe_jax.convert.table import count_parameters, leaf_shapes, router_table, table

HERE = Path("config.json")
SIZES = ("phi2", "stablelm", "tiny", "tiny_stablelm")


def official(model: ModelConfig, stored: dict | None = None) -> dict:
    """The written configuration of a model in float32."""
    keys = {row.key for row in table(model)}
    return official_config(ModelMeta("x", model, torch_config=stored), keys, "float32", "./clip")


def read_back(config: dict, model: ModelConfig) -> ModelConfig:
    """The shapes that a written configuration gives."""
    keys = {row.key for row in table(model)}
    select = config["mm_vision_select_layer"]
    meta = ModelMeta("x", model)
    llm = read_llm(config, keys, HERE)
    return ModelConfig(
        vision=read_vision(clip_config(meta, "float32"), HERE, select),
        llm=llm,
        projector=config["image_projector_type"],
        moe=read_moe(config, llm.layers, keys, HERE),
    )


@pytest.mark.parametrize("moe", [None, MoeConfig(), MoeConfig(6, 2, "0,3", use_residual=True)])
@pytest.mark.parametrize("size", SIZES)
def test_complete_without_a_stored_one(size: str, moe: MoeConfig | None) -> None:
    model = dataclasses.replace(presets.model(size, moe), projector="mlp3x_gelu")
    config = official(model)
    assert read_back(config, model) == model
    assert config["mm_image_tower"] == "./clip" and config["use_mm_proj"] is True
    needed = {"rope_theta", "tie_word_embeddings", "mm_hidden_size", "image_aspect_ratio"}
    assert needed <= config.keys()
    if moe and moe.experts == 6:
        assert config["moe"]["moe_layers_idx"] == [0, 3]
        assert config["moe"]["num_experts"] == [6, 6]


@pytest.mark.parametrize("size", ["tiny", "tiny_stablelm"])
def test_unchanged_model_keeps_its_configuration(size: str) -> None:
    stored = official(presets.model(size, MoeConfig())) | {"extra": 1, "tokenizer_x": None}
    stored["moe"] |= {"capacity_factor": 7.0, "moe_mode": "second_half"}
    assert official(presets.model(size, MoeConfig()), stored) == stored


def test_experts_added_to_a_dense_model() -> None:
    """Stage 2 -> stage 3: class, type and moe change; everything else stays."""
    dense = presets.model("tiny")
    stored = official(dense) | {"extra": 1, "mm_projector_lr": 3e-4, "image_aspect_ratio": "square"}
    config = official(presets.model("tiny", MoeConfig(top_k=2, aux_coef=0.5)), stored)
    changed = {key for key in config if config[key] != stored.get(key)}
    assert changed == {"architectures", "model_type", "moe"}
    assert config["architectures"] == ["MoELLaVAPhiForCausalLM"]
    assert config["model_type"] == "moe_llava_phi"
    assert config["moe"]["moe_enable"] and config["moe"]["top_k_experts"] == 2
    assert config["moe"]["router_aux_loss_coef"] == 0.5
    assert config["moe"]["train_modules"] == ["fc1", "fc2", "wg"]
    old = official(presets.model("tiny", MoeConfig()), stored | {"rope_scaling": None})
    assert "rope_scaling" not in old  # transformers 5 warns where it is


def test_changed_mixture_keeps_what_it_does_not_know() -> None:
    model = presets.model("tiny", MoeConfig(placement="first_half"))
    stored = official(model)
    stored["moe"] |= {"capacity_factor": 7.0, "ep_size": 4}
    config = official(presets.model("tiny", MoeConfig(placement="second_half")), stored)
    assert config["moe"]["capacity_factor"] == 7.0 and config["moe"]["ep_size"] == 4
    assert config["moe"]["moe_mode"] == "second_half"
    assert config["moe"]["moe_layers_idx"] == [2, 3]


def test_plain_configuration_from_a_med_moe_one() -> None:
    model = presets.model("tiny_stablelm")
    keys = {row.key for row in table(model, ["llm"])}
    meta = ModelMeta("x", model, torch_config=official(model) | {"eos_token_id": 3})
    config = plain_config(meta, keys, "bfloat16")
    assert read_llm(config, keys, HERE) == model.llm
    assert config["eos_token_id"] == 3 and config["torch_dtype"] == "bfloat16"
    assert config["architectures"] == ["StableLmForCausalLM"]
    foreign = {"rope_pct", "norm_eps", "moe", "mm_image_tower", "use_mm_proj", "video_global_proj"}
    assert not foreign & config.keys()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("moe", [None, MoeConfig(placement="second_half"), MoeConfig(meta=False)])
def test_table_is_invertible(size: str, moe: MoeConfig | None) -> None:
    """No key and no place twice, and the places of each leaf fill it."""
    rows = table(presets.model(size, moe))
    assert len({row.key for row in rows}) == len(rows)
    assert len({(row.path, row.index) for row in rows}) == len(rows)
    shapes = leaf_shapes(rows)
    for path, shape in shapes.items():
        mine = [row for row in rows if row.path == path]
        stacked = shape[: len(mine[0].index)]
        assert len(mine) == math.prod(stacked)
        assert {row.jax_shape for row in mine} == {shape[len(stacked) :]}


def test_full_sizes() -> None:
    """Parameter counts of the real models and some shapes of the stacked leaves."""
    counts = count_parameters(table(presets.model("phi2")))
    assert counts["llm"] == 2_779_683_840 - 51200  # Phi-2 without the bias of its output layer
    assert counts["vision"] == 303_507_456  # CLIP ViT-L/14 at 336 pixels
    stable = presets.model("stablelm", MoeConfig())
    assert count_parameters(table(presets.model("stablelm")))["llm"] == 1_644_515_328
    shapes = leaf_shapes(table(stable))
    assert shapes["llm/moe/experts/gate/kernel"] == (12, 4, 2048, 5632)
    assert shapes["llm/mlp/down/kernel"] == (12, 5632, 2048)
    assert shapes["llm/moe/router/fc1/kernel"] == (12, 2048, 4)
    assert leaf_shapes(router_table(2048, 4, 1)) == {
        "router/fc1/kernel": (2048, 4),
        "router/fc1/bias": (4,),
    }
