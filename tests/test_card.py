"""The model card: what the folder and the reports say, and 'unknown' for everything else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import yaml
from tiny_data import row, save_image, save_rows

from medmoe_jax import checkpoint, evaluate, provenance
from medmoe_jax.card import __main__ as card
from medmoe_jax.card import text
from medmoe_jax.config import LoraConfig, MoeConfig, RunConfig
from medmoe_jax.data.sources import read_samples

LICENCE = {
    "name": "CC-BY-4.0",
    "link": "https://creativecommons.org/licenses/by/4.0/",
    "note": "says the\npage",
    "citation": "Somebody 2020.",
}
ROUTER = {
    "n": 10,
    "accuracy": 0.9,
    "token_accuracy": 0.75,
    "classes": ["CT", "MRI", "X-ray", "Pathology"],
    "confusion": [[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]],
}


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions in a folder that names its licence."""
    folder = tmp_path_factory.mktemp("slake")
    for i in range(3):
        save_image(folder / "images" / f"i{i}.png", i)
    rows = [row(0, modality="CT"), row(1, "no", modality="MRI"), row(2, "lung")]
    rows = [one | {"answer_type": ("CLOSED", "CLOSED", "OPEN")[i]} for i, one in enumerate(rows)]
    save_rows(folder / "train.json", rows)
    summary = {"name": "slake", "licences": [LICENCE]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def recorded(data: Path, name: str, **outcome: Any) -> dict[str, Any]:
    """The record of a phase that read `data`."""
    file = str(data / "train.json")
    cfg = RunConfig(phase=name, init="somewhere/runs/before/model", train=("projector/.*",))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, files=(file,)))
    samples = read_samples([file], data / "images").samples
    sizes = {"trained": 1234, "all": 98765}
    return provenance.phase(
        cfg, steps=70, samples=samples, left_out=2, parameters=sizes, outcome=outcome
    )


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model went through two phases."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    meta = checkpoint.ModelMeta(
        "stage3",
        tiny_runs.model_config(moe=MoeConfig()),
        torch_config={"_name_or_path": "microsoft/phi-2"},
        clip_config={"_name_or_path": "/home/somebody/clip"},
        history=["converted from PyTorch: phi-2, base", "stage3 from router"],
        phases=[recorded(data, "router", router=ROUTER), recorded(data, "stage3", loss=0.5)],
    )
    checkpoint.save_model(run / "model", {"router": np.zeros(3)}, meta)
    return run


@pytest.fixture(scope="module")
def metrics(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two right answers and a wrong one."""
    folder = tmp_path_factory.mktemp("metrics")
    answers = [("r0", "yes"), ("r1", "yes"), ("r2", "lung")]
    lines = [
        {"question_id": i, "text": t, "model_id": "x/mine/model", "metadata": {"confidence": 0.75}}
        for i, t in answers
    ]
    save_rows(folder / "answers.jsonl", lines)
    found = evaluate.evaluate(data / "train.json", folder / "answers.jsonl", samples=50)
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder / "metrics.json"


def test_phases_record_data_settings_and_outcome(data: Path) -> None:
    found = recorded(data, "stage2", loss=1.5)
    assert json.loads(json.dumps(found)) == found
    digest = hashlib.sha256((data / "train.json").read_bytes()).hexdigest()
    assert found["files"] == [
        {"file": str(data / "train.json"), "sha256": digest, "rows": 3, "name": "slake"}
        | {"licences": [LICENCE]}
    ]
    modalities = {"CT": 1, "MRI": 1, "unknown": 1}
    assert found["rows"] == {"used": 3, "left_out": 2, "modalities": modalities}
    assert found["settings"]["optim"]["lr"] == 2e-5 and found["outcome"] == {"loss": 1.5}


def test_model_folders_keep_the_phases(folder: Path, data: Path) -> None:
    found = checkpoint.read_meta(folder / "model").phases
    assert found == [recorded(data, "router", router=ROUTER), recorded(data, "stage3", loss=0.5)]


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', '{"licences": 3, "name": 1}'])
def test_summaries_that_say_nothing_are_unknown(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    found = provenance.data_set(tmp_path / "train.json")
    assert found["name"] is None and found["licences"] is None and "summary.json" in found["why"]


def test_records_keep_their_licence(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("CC0-1.0, somewhere\n")
    (tmp_path / "train").mkdir()
    assert provenance.data_set(tmp_path / "train")["licences"][0]["name"] == "CC0-1.0, somewhere"


def test_the_card_says_what_is_recorded(folder: Path, metrics: Path, tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    card.main([str(folder), "--metrics", str(metrics), "--out", str(out)])
    shown = out.read_text()
    head = front_matter(shown)
    assert head["license"] == "unknown" and head["datasets"] == ["slake"]
    assert head["base_model"] == ["microsoft/phi-2"] and "/home/somebody" not in shown
    assert {"mixture-of-experts", "not-for-clinical-use"} <= set(head["tags"])
    (index,) = head["model-index"]
    assert index["name"] == "mine"
    figures = {m["name"]: m["value"] for r in index["results"] for m in r["metrics"]}
    assert figures["closed accuracy, strict"] == 50 and figures["open recall, strict"] == 100
    assert index["results"][0]["dataset"]["name"] == "slake train"

    assert "# mine\n\n**Not for clinical use.**" in shown
    assert "top-1 of 4, with meta expert, in layers 0;" in shown
    assert "parameters: 98,765" in shown and "base models: microsoft/phi-2" in shown
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["stage3", "70", "3", "2", "1,234", "0.500"] in [line[:6] for line in lines]
    assert ["started from", "before/model", "before/model"] in lines
    assert ["lr", "2e-05", "2e-05"] in lines
    assert ["CT", "3", "1", "0", "0"] in lines and "Right in 90.0% of 10" in shown
    expected = "CC-BY-4.0. https://creativecommons.org/licenses/by/4.0/. says the page. Somebody"
    assert f"- slake: {expected} 2020" in shown
    closed = next(line for line in lines if line[:1] == ["closed accuracy, strict"])
    assert closed[1:] == ["50.0", "0.0 to 100.0", "2"]
    assert "their model: `mine/model`" in shown
    assert "4 rows of the training data could not be used" in shown


def test_what_is_not_recorded_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    meta = checkpoint.ModelMeta("base", tiny_runs.model_config())
    checkpoint.save_model(tmp_path / "start", {"router": np.zeros(3)}, meta)
    card.main([str(tmp_path / "start"), "--name", "other", "--licence", "Apache-2.0"])
    shown = capsys.readouterr().out
    head = front_matter(shown)
    assert head["license"] == "apache-2.0" and not {"datasets", "base_model"} & head.keys()
    assert "model-index" not in head and "mixture-of-experts" not in head["tags"]
    for line in (
        "The steps that made it are unknown.",
        "What the model was trained on is unknown",
        "parameters: unknown",
        "base models: unknown",
        "Unknown: no report",
        "Its accuracy is unknown",
        "Licence of the weights: `Apache-2.0`, as stated",
    ):
        assert line in shown, line


def test_faults_say_what_to_do(folder: Path, metrics: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no model folder"):
        card.main([str(tmp_path)])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="its run has not ended"):
        card.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"run\.json is no report of .*evaluate"):
        card.main([str(folder), "--metrics", str(tmp_path / "run.json")])
    out = tmp_path / "README.md"
    out.write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        card.main([str(folder), "--out", str(out)])
    assert out.read_text() == "mine"
    card.main([str(folder), "--out", str(out), "--overwrite"])
    assert "# mine" in out.read_text()
    meta = checkpoint.read_meta(folder / "model")
    broken = dataclasses.replace(meta, phases=[{"phase": "stage1"}])
    checkpoint.save_model(tmp_path / "broken", {"router": np.zeros(3)}, broken)
    with pytest.raises(SystemExit, match="phases recorded is not whole"):
        card.main([str(tmp_path / "broken")])


def test_adapters_say_what_they_belong_to() -> None:
    delta = checkpoint.Delta("x/runs/router/model", "0", "paper", LoraConfig(rank=8))
    meta = checkpoint.ModelMeta("stage3", tiny_runs.model_config(), delta=delta)
    found = text.card(meta, {}, name="mine")
    assert "adapters alone (LoRA, rank 8): they belong to the model `router/model`" in found


def test_the_card_names_the_form_of_the_mixture() -> None:
    mixture = MoeConfig(placement="sparse", use_residual=True)
    meta = checkpoint.ModelMeta("stage3", tiny_runs.model_config(moe=mixture))
    assert "in layers 0, mixed with the meta expert by learnt weights" in text.card(
        meta, {}, name="a"
    )
