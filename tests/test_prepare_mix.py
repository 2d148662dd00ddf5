"""Mixtures of prepared folders, and prepared folders as TensorFlow Datasets, by their commands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from miniature_llava_med import images, instructed, picture, write_json
from miniature_medmnist import medmnist

from medmoe_jax.data.prepare import mix
from medmoe_jax.data.prepare.__main__ import main
from medmoe_jax.data.records import Records
from medmoe_jax.data.sources import read_samples


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepared(folder: Path, name: str, modalities: list[str], **change: Any) -> Path:
    """A prepared folder, as the commands of the data sets write it; the last row is of test."""
    rows = []
    for i, modality in enumerate(modalities):
        row = {
            "id": str(i),
            "image": f"sub/{i // 2}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {i} of {name}?"},
                {"from": "gpt", "value": "yes"},
            ],
            "answer_type": "CLOSED",
            "modality": modality,
            "question_type": "",
            "split": "test" if i == len(modalities) - 1 else "train",
            "source": name,
            "licence": f"licence of {name}",
            "rules": {"modality": "a rule"},
        }
        rows.append(row | change)
        (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "sub" / f"{i // 2}.jpg").write_bytes(picture(len(name) * 100 + i // 2))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(text)
    licence = {"name": f"licence of {name}", "link": "x", "note": "y", "citation": ""}
    (folder / "summary.json").write_text(json.dumps({"name": name, "licences": [licence]}))
    return folder


def run(recipe: str, out: Path, sources: list[Path], *more: str) -> int:
    command = ["mix", "--recipe", recipe, "--out", str(out), *more, "--source"]
    return main(command + [str(source) for source in sources])


@pytest.fixture
def five(tmp_path: Path) -> list[Path]:
    """The parts of phase 3, in another order than the recipe's."""
    found = []
    for flag in ("organcmnist", "pneumoniamnist"):
        file = medmnist(tmp_path / "npz", flag)
        out = tmp_path / flag
        command = ["medmnist", "--source", str(file), "--out", str(out), "--allow-counts"]
        assert main(command) == 0
        found.append(out)
    for name in ("path_vqa", "vqa_rad", "slake"):
        found.append(prepared(tmp_path / name, name, ["CT"] * 4))
    return found


def test_phase_3(tmp_path: Path, five: list[Path]) -> None:
    out = tmp_path / "mix"
    assert run("stage3", out, five, "--allow-counts") == 0
    rows = lines(out / "train.jsonl")
    assert Counter(row["source"] for row in rows) == {
        "vqa_rad": 3,
        "slake": 3,
        "path_vqa": 3,
        "pneumoniamnist": 5,
        "organcmnist": 5,
    }
    assert rows == lines(out / "manifest.jsonl")
    assert [row["id"] for row in rows[:4]] == ["vqa_rad-0", "vqa_rad-1", "vqa_rad-2", "slake-0"]
    assert len({row["id"] for row in rows}) == 19
    by_source = {source.name: source for source in five}
    for row in rows:
        name = row["source"]
        before = by_source[name] / "images" / row["image"].removeprefix(f"{name}/")
        assert (out / "images" / row["image"]).read_bytes() == before.read_bytes()
    original = lines(by_source["slake"] / "manifest.jsonl")[0]
    changed = {"id": "slake-0", "image": "slake/sub/0.jpg"}
    assert rows[3] == original | changed
    licences = (out / "licence.txt").read_text()
    assert "licence of slake" in licences and "CC-BY-4.0" in licences
    summary = json.loads((out / "summary.json").read_text())
    assert summary["published"]["differences"] == [
        {"rows": "train", "published": 44_053, "found": 19}
    ]
    assert (
        "vqa_rad 3 + slake 3 + path_vqa 3 + pneumoniamnist 5 + organcmnist 5"
        in (summary["remarks"])
    )
    assert len(read_samples([out / "train.jsonl"], out / "images").samples) == 19


def test_the_papers_numbers() -> None:
    totals = {name: sum(numbers.values()) for name, (_, numbers) in mix.RECIPES.items()}
    assert totals == {"stage3": 44_053, "scaling": 36_649}


def test_parts_that_are_a_published_version(tmp_path: Path, five: list[Path]) -> None:
    """A mirror may have other numbers than the original; what its own summary found counts."""

    def found(folder: Path, counts: dict[str, int], differences: list[Any]) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        summary["published"] = {"counts": counts, "differences": differences}
        (folder / "summary.json").write_text(json.dumps(summary))

    for folder in five:
        found(folder, {"train": 5, "test": 1}, [])
    assert run("stage3", tmp_path / "a", five) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["published"]["counts"] == {"train": 19}
    found(tmp_path / "slake", {"test": 1}, [])  # nothing is known of its train rows
    assert run("stage3", tmp_path / "b", five) == 1
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["published"]["counts"] == {"train": 16 + 4919}
    found(tmp_path / "slake", {"train": 9}, [{"rows": "train", "published": 9, "found": 3}])
    assert run("stage3", tmp_path / "c", five) == 1


def test_parts_that_lack_or_are_too_many(
    tmp_path: Path, five: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stage3", tmp_path / "a", five) == 1
    assert "44053      19" in capsys.readouterr().out
    assert run("stage3", tmp_path / "b", five[1:4]) == 1
    assert "no --source has train rows of slake, organcmnist" in capsys.readouterr().err
    assert run("stage3", tmp_path / "b", five[1:4], "--allow-counts") == 0
    assert run("scaling", tmp_path / "c", five, "--allow-counts") == 1
    assert "path_vqa, vqa_rad, slake is no part of 'scaling'" in capsys.readouterr().err
    twice = prepared(tmp_path / "again", "slake", ["CT"] * 3)
    assert run("stage3", tmp_path / "d", [*five, twice]) == 1
    assert "slake is in several folders" in capsys.readouterr().err
    assert run("stage3", tmp_path / "e", [tmp_path / "npz"]) == 1
    assert "is no prepared folder" in capsys.readouterr().err


def test_an_image_that_lacks(
    tmp_path: Path, five: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slake" / "images" / "sub" / "0.jpg").unlink()
    assert run("stage3", tmp_path / "a", five, "--allow-counts") == 1
    error = capsys.readouterr().err
    assert "'sub/0.jpg' is not in" in error and "2 of 19 row(s)" in error


MODALITIES = ["CT", "MRI", "X-ray", "Pathology", ""]


def test_the_routers_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So many of each, by the seed, from train alone."""
    sources = [prepared(tmp_path / name, name, MODALITIES * 6) for name in ("slake", "path_vqa")]
    draws = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        more = ("--per-modality", "5", "--seed", str(seed))
        assert run("router", tmp_path / name, sources, *more) == 0
        rows = lines(tmp_path / name / "manifest.jsonl")
        assert Counter(row["modality"] for row in rows) == dict.fromkeys(MODALITIES[:4], 5)
        assert {row["split"] for row in rows} == {"train"}
        draws[name] = [row["id"] for row in rows]
    assert draws["a"] == draws["b"] != draws["c"]
    assert {name.split("-")[0] for name in draws["a"]} == {"slake", "path_vqa"}
    assert run("router", tmp_path / "d", sources) == 1
    error = capsys.readouterr().err
    assert "too few train rows with a modality (CT 12, MRI 12, X-ray 12, Pathology 12" in error


def test_the_routers_rows_from_domain_flags(tmp_path: Path) -> None:
    folder = images(tmp_path / "source", 8)
    flags = ["mri", "ct_scan", "chest_xray", "gross", "histology", "mri", "mri", "ct_scan"]
    rows = [instructed(i, flag) for i, flag in enumerate(flags)]
    write_json(folder / "llava_med_instruct_60k.json", rows)
    out = tmp_path / "instruct"
    command = ["llava_med", "--source", str(folder), "--out", str(out), "--allow-counts"]
    assert main(command) == 0
    assert run("router", tmp_path / "router", [out], "--per-modality", "1") == 0
    drawn = lines(tmp_path / "router" / "train.jsonl")
    assert sorted(row["modality"] for row in drawn) == ["CT", "MRI", "Pathology", "X-ray"]


def test_tfds_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "my-set", "slake", ["CT", "MRI", "", "CT", "X-ray"])
    command = ["tfds", "--source", str(folder), "--out", str(tmp_path / "tfds")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    made = tmp_path / "tfds" / "my_set" / "1.0.0"
    assert str(made / "train") in printed and "licence of slake" in printed
    rows = lines(folder / "manifest.jsonl")
    read = [*Records(made / "train"), *Records(made / "test")]
    assert [record.row for record in read] == rows
    for record in read:
        assert record.images == ((folder / "images" / record.row["image"]).read_bytes(),)
    assert "licence of slake" in (made / "LICENSE").read_text()
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    assert main([*command, "--name", "other"]) == 1
    assert "licence is unknown" in capsys.readouterr().err
