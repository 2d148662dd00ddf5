"""What `medmoe_jax.load` takes: models with any experts, PyTorch folders; what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_data
import tiny_service

import medmoe_jax
from medmoe_jax import checkpoint
from medmoe_jax.checkpoint import load_model
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.data.problems import DataError
from medmoe_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("quick_compile")

SETTINGS = {"size": 12, "crop_size": 12}
SHORT = Sampling(max_new_tokens=10)


def test_other_experts_and_none(tmp_path: Path) -> None:
    """Experts that are no modalities are numbered; a dense model has no posterior."""
    for moe, names in ((MoeConfig(experts=2), ["expert 0", "expert 1"]), (None, None)):
        saved = tiny_service.save(tmp_path / str(moe), tiny_service.config("stablelm", moe))
        reply = medmoe_jax.load(saved).generate("Why?", None, Sampling(max_new_tokens=2))
        assert (reply.modality and list(reply.modality)) == names


def test_pytorch_folder(tmp_path: Path) -> None:
    """Answers are those of its conversion."""
    pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")
    import torch_folders

    from medmoe_jax.convert import to_jax

    spec = torch_folders.Spec(vocab=tiny_service.WORDS, layers=2, moe_layers=(0,))
    torch_folders.write_official(tmp_path / "torch", spec)
    config = json.loads((tmp_path / "torch/config.json").read_text())
    config["max_position_embeddings"] = 512
    torch_folders.write_json(tmp_path / "torch/config.json", config)
    tiny_data.save_tokenizer(tmp_path / "torch")
    torch_folders.write_json(tmp_path / "torch/clip/preprocessor_config.json", SETTINGS)
    to_jax(tmp_path / "torch", tmp_path / "jax")
    picture = tiny_data.save_image(tmp_path / "a.png")
    both = [medmoe_jax.load(tmp_path / name) for name in ("torch", "jax")]
    for question, pictures in (("Is there a lesion?", picture), ("Why?", None)):
        first, second = (m.generate(question, pictures, SHORT, options=["a", "b"]) for m in both)
        assert first == second and len(first.ids) > 1


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = tiny_service.save(tmp_path / "model", tiny_service.config("phi", MoeConfig()))
    with pytest.raises(ConversionError, match="does not exist"):
        medmoe_jax.load(tmp_path / "absent")
    with pytest.raises(DataError, match="template 'nonsense' is unknown"):
        medmoe_jax.load(folder, template="nonsense")
    with pytest.raises(ConfigError, match="dtype 'float7' is unknown; use one of float32"):
        medmoe_jax.load(folder, dtype="float7")
    params, meta = load_model(folder)
    checkpoint.save_model(tmp_path / "text", {"llm": params["llm"]}, meta)
    with pytest.raises(ConfigError, match="holds no vision and no projector"):
        medmoe_jax.load(tmp_path / "text")
    checkpoint.save_model(tmp_path / "bare", params, meta)
    with pytest.raises(DataError, match="no tokenizer"):
        medmoe_jax.load(tmp_path / "bare")
