"""The notebooks: in step with their text, stored without outputs, and run from top to bottom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
import quick_run
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.ipynb"))
PICTURES = {"01_tour": 3, "02_chat": 2, "03_finetune": 2, "04_to_pytorch": 1, "05_experts": 5}
SHORTER = {"03_finetune": ("STEPS = 40", "STEPS = 2")}  # what is changed to run in seconds


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_all_are_here() -> None:
    assert sorted(PICTURES) == NAMES == sorted(file.stem for file in FOLDER.glob("*.py"))
    index = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"({name}.ipynb)" in index and f"`{name}`" in index


@pytest.mark.parametrize("name", NAMES)
def test_in_step_with_the_text(name: str) -> None:
    """`jupytext --sync` would change nothing but what is not stored."""
    cells = read(name).cells
    text = jupytext.read(FOLDER / f"{name}.py").cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in text]


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    for cell in notebook.cells:
        assert not cell.metadata
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_they_install_the_same_way() -> None:
    setups = {next(c.source for c in read(name).cells if c.cell_type == "code") for name in NAMES}
    assert len(setups) == 1 and "REPOSITORY = " in setups.pop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they run: the demonstration has been here."""
    folder = tmp_path_factory.mktemp("notebooks")
    quick_run.save(folder / "runs" / "quick")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_runs(place: Path, name: str) -> None:
    notebook = read(name)
    for old, new in [SHORTER[name]] if name in SHORTER else []:
        (cell,) = [c for c in notebook.cells if old in c.source]
        cell.source = cell.source.replace(old, new)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
    env |= {  # and what one of them has compiled, the others read
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env.pop("MPLBACKEND", None)  # the kernel's own shows figures
    client = NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(place)}},
        extra_arguments=["--InteractiveShell.system_raise_on_error=True"],
    )
    client.execute(env=env)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    shown = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(shown) == PICTURES[name]
    printed = "".join(out.get("text", "") for out in outputs)
    assert "Traceback" not in printed and "Error" not in printed
    CHECKS[name](place / "runs", printed)


def check_tour(runs: Path, printed: str) -> None:
    assert "(done before)" in printed and "experts in layers (0, 2) of 4" in printed


def check_chat(runs: Path, printed: str) -> None:
    assert printed.count("ASSISTANT:") == 2 and "confidence" in printed


def check_finetune(runs: Path, printed: str) -> None:
    found = json.loads((runs / "mine/metrics.json").read_text())
    assert found["n"] == 60 and set(found["summary"]) >= {"closed accuracy, strict"}
    card = (runs / "mine/README.md").read_text()
    assert "CC0-1.0" in card and "| stage3 |" in card
    steps = (runs / "mine/stage3/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]


def check_to_pytorch(runs: Path, printed: str) -> None:
    difference = float(printed.split("largest difference of a logit: ")[1].split(",")[0])
    assert 0 < difference < 1e-4 and (runs / "exported/clip/config.json").is_file()


def check_experts(runs: Path, printed: str) -> None:
    found = json.loads((runs / "experts/all/analysis.json").read_text())
    assert found["routing"]["samples"]["all"] == 40


CHECKS = {
    "01_tour": check_tour,
    "02_chat": check_chat,
    "03_finetune": check_finetune,
    "04_to_pytorch": check_to_pytorch,
    "05_experts": check_experts,
}
