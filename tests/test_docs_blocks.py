"""Code blocks of the documentation: commands go through the real parsers, Python runs."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import command_lines
import matplotlib
import pytest
import yaml
from doc_blocks import PAGES, ROOT, Block, commands, page_blocks, spans
from tiny_data import save_image
from tiny_runs import save_start

from medmoe_jax.config import MoeConfig

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # Of ml_collections' loader, on Python 3.12.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
BLOCKS = page_blocks()
NOT_RUN = "not run:"  # an HTML comment in front of a Python block that needs what is not there


def of(kind: str) -> list[Any]:
    return [pytest.param(b, id=b.place) for b in BLOCKS if b.kind == kind]


def shell_faults(text: str, folder: Path) -> list[str]:
    """What is wrong with the commands of a block."""
    found = []
    for words in {tuple(words): words for words in commands(text, folder)}.values():
        if fault := command_lines.fault(words):
            found.append(f"{' '.join(words)}\n    {fault}")
    return found


@pytest.mark.parametrize("block", of("sh"))
def test_every_command_is_one_that_its_program_takes(block: Block, tmp_path: Path) -> None:
    assert not shell_faults(block.text, tmp_path), block.place


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("python -m medmoe_jax.predict --model-path m --question-file q", "required"),
        ("python -m medmoe_jax.evaluate --gt a --pred b --metrics both", "--metrics"),
        ("python -m medmoe_jax.evaluate --gt a --pred b --metric loose", "invalid choice"),
        ("python -m medmoe_jax.convert to-jaxx a b", "invalid choice"),
        ("python -m medmoe_jax.chatt --model-path m", "no module"),
        ("python -m medmoe_jax.train --config configs/stage3.py:phi2 --workdir w --lr=1", "lr"),
        ("python -m medmoe_jax.train --config configs/stage3.py:phi3 --workdir w", "phi3"),
        (
            "python -m medmoe_jax.train --config configs/stage4.py:phi2 --workdir w",
            "cannot be read",
        ),
        ("python -m medmoe_jax.train --config configs/stage3.py:phi2", "workdir"),
        ("--config.optim.rate=1e-4", "rate"),
        ("--config.optim.lr=fast", "lr"),
        ("--config.optim.steps=1.5", "steps"),
        ("--config.remat=some", "remat"),
        ("--config.model.moe.top_k=3", "top_k"),
        ("python -m medmoe_jax.plan --config configs/stage1.py:phi2 --target v9:2x2", "v9"),
        (
            "for s in phi2 big; do python -m medmoe_jax.info --config configs/stage1.py:$s; done",
            "big",
        ),
        ("python benchmarks/train.py", "benchmarks/train.py"),
        ("python benchmarks/training.py --fast", "--fast"),
        ("python launch/local.py --proc x -- --config a", "invalid int"),
        ("launch/tpu_vm.sh create n --region Z --type v5litepod-8", "--region"),
        ("bash launch/slurm.sh --config configs/stage3.py:phi2 --workdir w --nodes 2", "nodes"),
        ("sky launch launch/sky.yaml", "launch/sky.yaml"),
        ("docker build -f launch/Dockerfile --target cuda .", "no stage"),
        ("pip install -e '.[gpu]'", "no extra gpu"),
        ("make demos", "no demos"),
        ("make demo MODEL=phi", "no MODEL"),
        ("medmoe train", "command not found"),
        ("python -m medmoe_jax.chat --model-path 'm", "unexpected EOF"),
    ],
)
def test_a_wrong_command_is_found(text: str, told: str, tmp_path: Path) -> None:
    try:
        found = shell_faults(text, tmp_path)
    except AssertionError as unusable:
        found = [str(unusable)]
    assert found and told in found[0].rpartition("\n    ")[2], found


def test_loops_variables_and_quotes_are_those_of_a_shell(tmp_path: Path) -> None:
    script = """
        for size in a b; do
            python -m x --name "$size's" \\
                --more=('1', "2")  # said
        done
    """.replace("('1', \"2\")", "\"('1', '2')\"")
    assert commands(script, tmp_path) == [
        ["python", "-m", "x", "--name", "a's", "--more=('1', '2')"],
        ["python", "-m", "x", "--name", "b's", "--more=('1', '2')"],
    ]


# --- Python ---


def furnish(tree: ast.Module, model: Path) -> None:
    """Puts a tiny model and pictures where the block looks for them, below the working folder."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        path = Path(node.value)
        if path.name == "model" and not path.is_absolute() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(model)
        elif path.suffix in (".png", ".jpg") and "\n" not in node.value:
            save_image(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("tiny") / "model", moe=MoeConfig())


@pytest.mark.parametrize(
    "page", sorted({b.page for b in BLOCKS if b.kind == "python" and NOT_RUN not in b.note})
)
def test_python_runs(
    page: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page one after the other, as one program."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in BLOCKS:
        if block.page == page and block.kind == "python" and NOT_RUN not in block.note:
            tree = ast.parse(block.text, block.place)
            furnish(tree, tiny)
            exec(compile(tree, block.place, "exec"), names)


def unresolved(text: str) -> list[str]:
    """Imports, attributes and arguments in a piece of Python that do not exist; nothing but its
    imports is run."""
    tree, names, found = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "import", "exec"), names)

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := value(node.value)) is not None:
            if not hasattr(owner, node.attr):
                found.append(ast.unparse(node))
            return getattr(owner, node.attr, None)
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and callable(called := value(node.func)):
            named = [word.arg for word in node.keywords if word.arg]
            try:
                inspect.signature(called).bind_partial(*node.args, **dict.fromkeys(named))
            except TypeError as error:
                found.append(f"{ast.unparse(node)}: {error}")
            except ValueError:
                continue  # written in C, without a signature
    return sorted(set(found))


@pytest.mark.parametrize("block", [p for p in of("python") if NOT_RUN in p.values[0].note])
def test_python_that_cannot_run_names_what_exists(block: Block) -> None:
    assert not unresolved(block.text)


def test_names_that_do_not_exist_are_found() -> None:
    assert unresolved("import medmoe_jax\nmedmoe_jax.load('m', mush=1)") == [
        "medmoe_jax.load('m', mush=1): got an unexpected keyword argument 'mush'"
    ]
    assert unresolved("from medmoe_jax import metrics\nmetrics.loose([])") == ["metrics.loose"]
    with pytest.raises(ImportError, match="sample"):
        unresolved("from medmoe_jax import sample")


# --- other languages, and code within text ---


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS])
def test_blocks_are_of_a_known_language_and_whole(block: Block) -> None:
    if block.kind == "json":
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            assert [json.loads(line) for line in block.text.splitlines() if line], block.place
    elif block.kind == "yaml":
        yaml.safe_load(block.text)
    elif block.kind == "toml":
        tomllib.loads(block.text)
    elif block.kind == "csv":
        assert len({len(row) for row in csv.reader(block.text.splitlines())}) == 1
    else:
        assert block.kind in ("sh", "python", "text", "mermaid"), block.place


@functools.cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"medmoe_jax.{name}") is not None
    except ModuleNotFoundError:
        return False


def span_faults(code: str) -> list[str]:
    """What a piece of code within a text names that does not exist."""
    found = []
    for path in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", code):
        if not command_lines.setting(path):
            found.append(f"there is no setting {path}")
    for module in re.findall(r"python -m medmoe_jax\.([a-z_.]*[a-z_])", code):
        if not is_module(module):
            found.append(f"there is no module medmoe_jax.{module}")
    whole = re.fullmatch(
        r"(?!\w+\.(?:py|md|json)$)((?:data|optim|log|mesh|cluster|evaluation)\.[a-z_.0-9]+)(=.*)?",
        code,
    )
    if whole and not command_lines.setting(whole.group(1)) and not is_module(whole.group(1)):
        found.append(f"neither a setting nor a module: {whole.group(1)}")
    if re.fullmatch(rf"{command_lines.FOLDERS}[\w./-]+", code) and "NAME" not in code:
        path = code.partition(":")[0]
        if not (ROOT / path).exists():
            found.append(f"there is no file {path}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_within_text_names_what_exists(page: Path) -> None:
    found = [
        f"line {line}: {fault}"
        for line, code in spans(page.read_text(encoding="utf-8"))
        for fault in span_faults(code)
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "--config.data.on_eror=skip",
        "python -m medmoe_jax.eval",
        "optim.learning_rate",
        "launch/pbs.sh",
    ],
)
def test_a_wrong_name_within_text_is_found(code: str) -> None:
    assert span_faults(code)
