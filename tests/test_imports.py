"""Who imports whom: data flows one way, and the model runs where the other libraries are absent."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "medmoe_jax"

# Module (regex) -> what it may import from this package (regex). The first match decides; what is
# not listed sits above and may import everything but the entry points.
ALLOWED = {
    r"config|hardware|losses|metrics|stored|models\.(one_row|one_expert|fallback)": r"",
    r"models\.int4_rows": r"models\.fallback",
    r"models\.quantized": r"models\.int4_rows",
    r"sharding|distributed|compilation|optim|presets|sampling": r"config",
    r"lora(\.merged)?": r"config|stored|lora\.merged|models\.quantized",
    r"upcycle": r"config|stored",
    r"limits": r"config|upcycle|models\.layers",
    r"command_line": r"config",
    r"checkpoint": r"config|lora|stored|upcycle",
    r"models\.layers": r"sharding|models\.(quantized|one_row)",
    r"models\.attention": r"models\.(layers|fallback)",
    r"models\.grouped": r"models\.layers",
    r"models\.products": r"models\.(layers|one_expert|fallback)",
    r"models\.buckets": r"models\.(layers|grouped|products)",
    r"models\.tiles": r"models\.(layers|products|quantized)",
    r"models\.experts": r"sharding|models\.(layers|grouped|buckets|products|quantized|tiles)",
    r"models\.(clip|projector)": r"config|models\.(attention|layers)",
    r"models\.moe": r"config|models\.(layers|experts)",
    r"models\.decoder": r"config|models\.(attention|layers|experts|moe)",
    r"models\.medmoe": r"config|models\.(layers|clip|projector|decoder)",
    r"data(\..*)?": r"config|data(\..*)?",
    r"convert\.check": r"config|checkpoint|convert\..*|data\..*|models\..*|generate|losses"
    r"|sampling",
    r"convert\.peft": r"config|checkpoint|lora|convert\..*",
    r"convert(\..*)?": r"config|checkpoint|stored|convert(\..*)?",
    r"provenance": r"config|data\.sources",
    r"info": r"config|command_line|lora|models\..*",
    r"router|step": r"config|losses|lora|optim|sharding|models\..*",
    r"flops": r"config|optim",
    r"plan(\..*)?": r"config|command_line|hardware|flops|layout|limits|optim|placement|sharding"
    r"|step|generate|models\..*|plan\..*",
    r"layout": r"config|lora|optim|quantize|sharding|step|models\..*",
    r"generate|beam": r"config|losses|sampling|sharding|generate|models\..*",
    r"responder|conversation": r"config|sampling|sharding|generate|beam|responder|data\..*",
    r"model": r"config|checkpoint|sampling|sharding|generate|responder|conversation|placement"
    r"|data\..*|convert\.(folder|report)|models\.layers",
    r"quantize": r"config|models\..*",
    r"analyse\.(geometry|deletion)": r"data\.placement|evaluation\.bootstrap",
    r"analyse\.[a-z]+": r"config|losses|metrics|sampling|generate|quantize|responder|data\..*"
    r"|models\..*|evaluation\..*|analyse\..*",
    r"placement": r"config|quantize|sharding|models\..*",
    r"serve\.batching": r"sampling|responder",
    r"serve\.fields": r"sampling",
    r"serve(\..*)?": r"config|compilation|sampling|responder|conversation|model|data\..*|serve\..*",
    r"evaluation(\..*)?": r"config|metrics|data\.(problems|sources)|evaluation(\..*)?",
}
ENTRY = r"train|info|chat|evaluate|(.*\.)?__main__"
# Experiments run many phases: a process for each would spend most of its time on starting. Their
# tables hold what `info` counts.
ABOVE_ENTRIES = {"experiments.study": {"train"}, "experiments.costs": {"info"}}
OPTIONAL = {
    "torch",
    "nltk",
    "sacrebleu",
    "matplotlib",
    "pydicom",
    "nibabel",
    "pydantic",
    "pydantic_core",
    "starlette",
    "uvicorn",
}  # extras: imported in functions, so that the rest works without
# What needs an extra from top to bottom, and is itself imported in functions.
TORCH_ONLY = ("convert.torch_model", "convert.torch_reference")
SERVE_ONLY = ("serve.fields", "serve.messages", "serve.replies", "serve.app")


def modules() -> dict[str, ast.Module]:
    """Dotted name within the package -> parsed source."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(), str(file))
    return found


MODULES = modules()


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported in `tree`, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import at line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(tree: ast.AST) -> set[str]:
    """The modules of the package among them."""
    inside = [n.removeprefix(f"{PACKAGE}.") for n in imported(tree) if n.startswith(f"{PACKAGE}.")]
    return {n if n in MODULES else n.rpartition(".")[0] for n in inside}


def outside(tree: ast.AST) -> set[str]:
    """Top-level names of the libraries among them; the standard library is left out."""
    names = {name.split(".")[0] for name in imported(tree)}
    return names - {PACKAGE} - sys.stdlib_module_names


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported."""
    guarded = [
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    kept = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node not in guarded
    ]
    return ast.Module(kept, [])


@pytest.mark.parametrize("name", [n for n in MODULES if n])
def test_direction(name: str) -> None:
    targets = own(MODULES[name])
    entries = {t for t in targets if re.fullmatch(ENTRY, t)} - ABOVE_ENTRIES.get(name, set())
    assert not entries, f"{name} imports {entries}, which nobody may"
    if not name.startswith(("demo", "experiments")):
        assert not {t for t in targets if t.startswith("experiments")}, name
        assert not {t for t in targets if t.startswith("demo")}, f"{name} imports the demo"
    for pattern, allowed in ALLOWED.items():
        if re.fullmatch(pattern, name):
            wrong = {t for t in targets if not re.fullmatch(allowed, t)}
            assert not wrong, f"{name} imports {wrong}; allowed: {allowed or 'nothing'}"
            return


def test_the_rules_are_about_something() -> None:
    """Every rule matches a module, so that a renamed one does not escape."""
    for pattern in [*ALLOWED, *TORCH_ONLY, *SERVE_ONLY, "train", "info"]:
        assert any(re.fullmatch(pattern, name) for name in MODULES), pattern


def test_no_cycle() -> None:
    graph = {name: own(tree) - {name} for name, tree in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_libraries() -> None:
    for name, tree in MODULES.items():
        if name.startswith("models"):
            assert outside(tree) <= {"jax", "flax", "numpy", "chex"}, name
        if name.startswith(("convert", "data", "checkpoint")):
            assert "flax" not in outside(tree), name
        if name not in (*TORCH_ONLY, *SERVE_ONLY):
            assert not outside(at_import(tree)) & OPTIONAL, name
            assert not own(at_import(tree)) & {*TORCH_ONLY, *SERVE_ONLY}, name
        private = {n for n in imported(tree) if n.startswith(("jax._", "jaxlib", "flax.core"))}
        assert not private, f"{name} uses {private}"


def test_pickles_are_read_safely() -> None:
    """`torch.load` runs no code of the file; nothing else unpickles."""
    for name, tree in MODULES.items():
        assert not imported(tree) & {"pickle", "dill", "joblib"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{name}, line {node.lineno}"


def test_the_model_needs_jax_flax_and_numpy_alone() -> None:
    """It imports and is described where data, serving and conversion libraries are absent."""
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ImportError(f"{name} is absent")

sys.meta_path.insert(0, Absent())
from medmoe_jax import config, presets
from medmoe_jax.models import medmoe
print(len(medmoe.shapes(presets.model("tiny", config.MoeConfig()))))
"""
    absent = (
        "optax orbax grain ml_collections PIL safetensors tensorboardX tqdm transformers torch nltk"
    )
    command = [sys.executable, "-c", code, *absent.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr
