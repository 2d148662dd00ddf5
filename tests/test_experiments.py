"""Experiments from start to page: a very small study on own files, and tables of stored cells."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs

from medmoe_jax import distributed
from medmoe_jax.config import ConfigError, MoeConfig, RunConfig
from medmoe_jax.data.problems import DataError
from medmoe_jax.experiments import __main__ as main
from medmoe_jax.experiments import answers, costs, paper, report
from medmoe_jax.experiments import compare as comparing
from medmoe_jax.experiments.catalogue import COMPARISONS, EXPERIMENTS
from medmoe_jax.experiments.cells import DONE, Cell, Store, every
from medmoe_jax.experiments.compare import Comparison, Pair, Row
from medmoe_jax.experiments.config import (
    AnswersConfig,
    FilesConfig,
    PhantomConfig,
    Phases,
    StudyConfig,
    check,
)
from medmoe_jax.experiments.result import Claim, Result, Table, claim, markdown
from medmoe_jax.experiments.statistics import Difference
from medmoe_jax.experiments.study import Study

pytestmark = pytest.mark.usefixtures("quick_compile")
TITLE = "With and without the meta expert"
ROOT = Path(__file__).resolve().parents[1]
SETTING = {"command": "python -m this", "seeds": 1, "phantoms": False, "models": ["a", "b"]}


def small_study(folder: Path, seeds: int = 1) -> Study:
    """A study of the random model on sixteen random pictures; two steps a phase."""
    init = tiny_runs.save_start(folder / "start")
    questions = tiny_runs.save_questions(folder)
    dense = tiny_runs.model_config()
    mixed = dataclasses.replace(dense, moe=MoeConfig())

    def phase(name: str, model: Any, **more: Any) -> RunConfig:
        run = RunConfig(phase=name, model=model, compute_dtype="float32", **more)
        run = tiny_runs.run_config(run, init, questions, steps=2, lr=1e-2)
        return dataclasses.replace(run, init="")

    phases = Phases(
        init=str(init),
        stage1=phase("stage1", dense, train=("projector/.*",)),
        stage2=phase("stage2", dense, train=("projector/.*", "llm/.*")),
        router=phase("router", mixed, train=("router/.*",), objective="router"),
        stage3=phase("stage3", mixed, train=("llm/moe/(experts|meta)/.*",)),
    )
    roles = ("alignment", "instruct", "instruct_heldout", "tune")
    files = FilesConfig(
        **{role: (str(questions),) for role in roles},
        tests=(f"First={questions}", f"Second={questions}"),
        image_folder=str(folder / "images"),
    )
    cfg = StudyConfig(files=files, phi=phases, bootstrap=200)
    cfg.answers.rows, cfg.answers.max_new_tokens, cfg.answers.batch_size = 4, 2, 4
    return Study(cfg, seeds)


@pytest.mark.slow
def test_a_small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two variants are trained, answered and compared; a second run computes nothing."""
    study, store = small_study(tmp_path), Store(tmp_path / "run")
    table = Comparison(
        TITLE,
        (Row("without", variant="no_meta"), Row("with")),
        (Pair("with", "without", "it helps"),),
    )
    for cell in table.cells(study):
        store.get(cell)
    folder = tmp_path / "run" / report.FOLDER
    folder.mkdir()
    result = table.result("table5", study, store, folder)
    report.save(result, folder, SETTING)

    # Levels are what the answers say, question by question.
    cell = store.place(table.cells(study)[1])
    asked = json.loads((tmp_path / "questions.json").read_text())[:4]
    said = [json.loads(line) for line in (cell / "First.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in said] == [row["id"] for row in asked]
    right = [
        row["conversations"][1]["value"].lower() in answer["text"].lower()
        for row, answer in zip(asked, said, strict=True)
        if row["answer_type"] == "CLOSED"
    ]
    found = result.data["levels"]["with"]["First closed"]
    assert found["mean"] == pytest.approx(100 * np.mean(right)) and found["std"] is None
    assert set(result.data["levels"]["with"]) == {
        *("First open", "First closed", "Second open", "Second closed", "mean")
    }
    assert [table.title for table in result.tables][-1].startswith("The paper's Table 5")
    assert (folder / "table5.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("run/cells/*/checkpoints"))

    page = report.write_page(tmp_path / "run", ["table5"]).read_text()
    assert "data:image/png;base64," in page and "it helps" in page and "58.55" in page
    assert "src='http" not in page and "<script" not in page

    monkeypatch.setattr("medmoe_jax.train.train", None)  # a second run would fail
    monkeypatch.setattr(answers, "answer", None)
    again = Store(tmp_path / "run")
    for cell in table.cells(small_study(tmp_path)):
        again.get(cell)


def stored(store: Store, study: Study, row: Row, right: list[float], seed: int) -> None:
    """A finished answers cell with the given worth of open answers."""
    cell = study.answers(row.model(study, seed), seed)
    folder = store.place(cell)
    folder.mkdir(parents=True)
    values: dict[str, list[float | None]] = {name: [None] * len(right) for name in answers.FIGURES}
    values["open"] = list(right)
    part = {"images": [f"i{n}" for n in range(len(right))], "task": [""] * len(right)}
    found = {"tests": {"Findings": part | {"figures": values}}, "seconds": 1.0}
    (folder / answers.SCORES).write_text(json.dumps(found))
    for known in (folder, store.place(row.model(study, seed))):
        known.mkdir(exist_ok=True)
        (known / DONE).write_text(json.dumps({"seconds": 60.0}))


def test_a_table_of_stored_cells(tmp_path: Path):
    cfg = runpy.run_path(str(ROOT / "configs" / "experiments.py"))["get_config"]("tiny")
    study, store = Study(dataclasses.replace(cfg, bootstrap=500), 2), Store(tmp_path)
    better, worse = Row("better"), Row("worse", variant="no_meta")
    for seed, gain in ((0, 0.25), (1, 0.5)):
        stored(store, study, better, [1.0] * 8, seed)
        stored(store, study, worse, [1 - gain] * 8, seed)
    table = Comparison(
        "A table",
        (better, worse),
        (Pair("better", "worse", "it is"), Pair("worse", "better", "it is not", of_paper=False)),
        hours=True,
        notes=("a note",),
    )
    result = table.result("table9", study, store, tmp_path)
    assert result.tables[0].columns == ("", "Findings open", "mean", "training")
    assert result.tables[0].rows[1] == ("worse", "62.5 ± 17.7", "62.5 ± 17.7", "60 s")
    assert result.tables[1].rows[0][1] == "+37.5 [+25.0, +50.0]"
    assert [c.verdict for c in result.claims] == [1, -1]
    assert result.claims[0].words() == "reproduced"
    assert result.claims[1].words() == "no"
    assert result.claims[1].evidence.startswith("the opposite is seen: -37.5")
    assert result.notes == ("a note", f"On the paper's table: {paper.TABLES['table9'].remark}")

    report.save(result, tmp_path, SETTING)
    assert report.load(tmp_path / "table9.json") == (result, SETTING)
    text = (tmp_path / "table9.md").read_text()
    assert "| better | 100.0 ± 0.0 | 100.0 ± 0.0 | 60 s |" in text
    assert "* **it is**: reproduced (+37.5 [+25.0, +50.0] points" in text


def test_a_claim_is_undecided_where_the_interval_holds_zero():
    assert claim("x", Difference(1.0, -0.1, 2.0)).words().startswith("undecided")
    assert claim("x", Difference(-1.0, -2.0, -0.1)).words().startswith("not reproduced")


def test_tests_without_any_column_say_what_is_missing(tmp_path: Path):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "a"}]
    row = {"id": 1, "answer_type": "CLOSED", "options": ["a", "b"], "label": 0}
    scores = answers.score([row | {"conversations": turns}], [{"question_id": 1, "text": "a"}])
    (tmp_path / answers.SCORES).write_text(json.dumps({"tests": {"mine": scores}}))
    assert answers.read_scores(tmp_path).names == ("mine closed",)
    with pytest.raises(DataError, match="classification needs 'task'"):
        answers.read_tasks(tmp_path)


def test_pages_escape_what_they_show(tmp_path: Path):
    table = Table("<t>", ("", "a|b"), (("<row>", "1"),))
    folder = tmp_path / report.FOLDER
    folder.mkdir()
    result = Result("x", "<b>", (table,), (Claim("<c>", 0, "none"),))
    report.save(result, folder, SETTING)
    page = report.write_page(tmp_path, []).read_text()
    assert "&lt;row&gt;" in page and "<row>" not in page and "<c>" not in page
    assert markdown(table).splitlines()[0] == "|  | a\\|b |"
    report.save(dataclasses.replace(result, name="y"), folder, SETTING)
    report.write_page(tmp_path, ["y"])
    text = (folder / "report.md").read_text()
    assert text.count("## <b>") == 2 and text.count("Made by `python -m this`") == 1
    assert text.count("* **<c>**: undecided") == 2 and text.count("| <row> | 1 |") == 2
    with pytest.raises(FileNotFoundError, match="holds no result"):
        report.write_page(tmp_path / "other", [])


def test_tables_of_the_paper_are_whole():
    for name, table in paper.TABLES.items():
        assert all(len(row) == len(table.columns) for row in table.rows.values()), name
    assert comparing.OPEN_CLOSED == ("open", "closed")


def test_sizes_are_those_of_table_14(tmp_path: Path):
    cfg = runpy.run_path(str(ROOT / "configs" / "experiments.py"))["get_config"]("tiny")
    result = costs.table14("table14", Study(cfg, 1), Store(tmp_path), tmp_path)
    assert len(result.claims) == 4 and all(c.verdict in (1, -1) for c in result.claims)
    phi = next(row for row in result.tables[0].rows if row[0] == "Med-MoE (Phi2)")
    assert phi[1:6] == ("4", "2", "16", "2560", "32") and phi[6] == "3.62B"
    activated = next(c for c in result.claims if c.text.startswith("Med-MoE (Phi2): 3.6B"))
    assert activated.words() == "reproduced" and activated.evidence == "3.62B counted"


def test_every_experiment_has_cells_and_shares_them():
    cfg = runpy.run_path(str(ROOT / "configs" / "experiments.py"))["get_config"]("tiny")
    study = Study(cfg, 2)
    lists = {name: one.cells(study) for name, one in EXPERIMENTS.items()}
    assert {"table1", "table7", "table8", "table14", "routing_null"} <= set(lists)
    whole = every([cell for cells in lists.values() for cell in cells])
    names = [cell.name for cell in whole]
    assert len(set(names)) == len(names)  # equal names are equal work
    assert len(whole) < sum(len(every(cells)) for cells in lists.values()) / 2
    for name, table in paper.TABLES.items():
        assert name in EXPERIMENTS and table.rows
    titles = {name: [row.title for row in c.rows] for name, c in COMPARISONS.items()}
    for name, comparison in COMPARISONS.items():
        for pair in comparison.pairs:
            assert {pair.first, pair.second} <= set(titles[name]), name


def test_costs_are_measured_once():
    """Whatever the seeds and however they are shared out."""
    study = Study(runpy.run_path(str(ROOT / "configs" / "experiments.py"))["get_config"](), 3)
    wanted = {cell.digest for cell in EXPERIMENTS["table8"].cells(study)}
    for worker in (0, 1):
        cells = main.in_turn(study, ["table8"], worker)
        assert {c.digest for c in cells if c.name.startswith("costs")} == wanted
    assert len(wanted) == 4


def test_names_on_the_command_line():
    assert main.chosen(["table9", "table1"]) == ["table1", "table9"]
    assert main.chosen(["all"]) == list(EXPERIMENTS)
    for words in ([], ["table99"]):
        with pytest.raises(ConfigError, match="use all, report or some of table1"):
            main.chosen(words)


@pytest.mark.parametrize(
    "wrong",
    [{"lora_ranks": ()}, {"labels": (0, 5)}, {"bootstrap": -1}, {"answers": AnswersConfig(0, 0)}],
)
def test_settings_of_a_study_are_checked(wrong: dict[str, Any]):
    check(StudyConfig(bootstrap=0))
    with pytest.raises(ConfigError, match=r"config.lora_ranks is .* must be 1 or more"):
        check(StudyConfig(**wrong))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": 7}, "train=7, test=160, size=112 is too small: use at least 8 images"),
        ({"size": 55}, "size=55 is too small.* 56 pixels"),
        ({"vision_studies": 0}, "needs studies and steps"),
        ({"language_steps": 0}, "needs studies and steps"),
        ({"test_questions": 0.0}, "questions of an image must be more than 0"),
    ],
)
def test_phantom_data_of_a_study_are_checked(wrong: dict[str, Any], said: str):
    check(StudyConfig(phantom=PhantomConfig(train=8, test=8, size=56)))
    with pytest.raises(ConfigError, match=f"config.phantom: .*{said}"):
        check(StudyConfig(phantom=PhantomConfig(**wrong)))


def test_files_of_a_study_are_checked():
    """Also of folders that have an equals sign in their name."""
    files = FilesConfig(tune=("run=3/train.json",), tests=("A=run=3/a.json", "B=b.json"))
    study = Study(StudyConfig(files=files), 1)
    check(study.cfg)
    assert study.paths("tune", None) == ("run=3/train.json",)
    assert study.paths("tests", None) == ("run=3/a.json", "b.json")
    for tests in (("a.json",), ("A=a.json", "A=b.json"), ("x/A=a.json",), ("A=",)):
        with pytest.raises(ConfigError, match=r"config\.files\.tests is .* NAME=FILE"):
            check(StudyConfig(files=FilesConfig(tests=tests)))


def test_a_failed_cell_fails_what_needs_it_alone(tmp_path: Path):
    log: list[str] = []

    def cell(name: str, *parents: Cell) -> Cell:
        def make(folder: Path, _: list[Path]) -> None:
            if name == "bad":
                raise ConfigError("no good")
            log.append(name)

        return Cell(name, {"name": name}, parents, make)

    bad = cell("bad")
    leaves = [cell("child", bad), cell("other", cell("base"))]
    wrong = main.work(every(leaves), Store(tmp_path), 0)
    assert wrong == {"bad": "no good", "child": "it needs bad, which failed"}
    assert log == ["base", "other"]


def test_asked_to_end_it_says_so_in_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object) -> int:
        raise distributed.Preempted("SIGTERM: stopped behind step 3 of 9")

    given = SimpleNamespace(
        workdir=str(tmp_path), seeds=1, jobs=1, worker=0, config=StudyConfig(compilation_cache="-")
    )
    monkeypatch.setattr(main, "run", stopped)
    monkeypatch.setattr(main.flags, "FLAGS", given)
    monkeypatch.setattr(main.compilation, "keep", lambda _: None)
    assert main.main(["experiments", "table4"]) == distributed.PREEMPTED
