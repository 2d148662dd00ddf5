"""Builds the documentation site: `python docs/build.py [--out build/docs]` makes `build/docs/site`.

The pages are those of `docs/`, README.md as the home page, CONTRIBUTING.md, CHANGELOG.md and
benchmarks/README.md, and one page of API reference a module, made from the docstrings. All is
gathered in a folder and handed to Zensical in its strict mode, where any warning, as of a link to a
page or a heading that does not exist, is a failure. A page that `docs/mkdocs.yml` gives no place in
the navigation comes under "More". Needs the extra `docs`, and no network.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "medmoe_jax"
# Files outside docs/ that are pages of the site -> their names there.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
PIPED = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")  # code in a table with a bar that is escaped
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """Path in the repository -> path in the site, of every page that is written by hand."""
    own = {f"docs/{p.name}": p.name for p in sorted((ROOT / "docs").glob("*.md"))}
    return own | ELSEWHERE


def dotted(path: str) -> str:
    """Name of the module in a file, by the file's path in the repository."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def modules() -> list[str]:
    """Dotted names of the public modules: all but the entry points and what begins with `_`."""
    files = (ROOT / PACKAGE).rglob("*.py")
    found = sorted(dotted(file.relative_to(ROOT).as_posix()) for file in files)
    return [name for name in found if "._" not in name]


def unescaped(match: re.Match[str]) -> str:
    """Code with a bar in a table: a forge takes `\\|` for the bar, the site's Markdown for both."""
    code = html.escape(match.group(1).replace("\\|", "|"), quote=False)
    return f"<code>{code.replace('|', '&#124;')}</code>"


def relinked(text: str, source: str, known: dict[str, str]) -> str:
    """`text` with links and tables that work in the site.

    Links in the files are relative to the file, so that they work on a forge. Those to other pages
    and to pictures are turned, those to a module lead to its reference; what else lies in the
    repository is no part of the site and is named by its path.

    Args:
      text: Markdown.
      source: path of the page in the repository.
      known: see `pages`.

    Raises:
      FileNotFoundError: a link to what does not exist.
    """

    public = set(modules())

    def one(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        if not target or re.match(r"[a-z]+:", target):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: the link to {target} leads nowhere; correct it")
        place = known.get(path) or (f"api/{dotted(path)}.md" if dotted(path) in public else "")
        if place:
            return f"{picture}[{words}]({place}{anchor or ''})"
        if path.startswith("docs/assets/"):
            return f"{picture}[{words}]({path.removeprefix('docs/')})"
        named = words.strip("`").rstrip("/")
        return f"`{path}`" if named in (path, target.rstrip("/")) else f"{words} (`{path}`)"

    def turned(part: str) -> str:
        lines = LINK.sub(one, part).splitlines(keepends=True)
        return "".join(PIPED.sub(unescaped, s) if s.startswith("|") else s for s in lines)

    parts, end = [], 0
    for code in FENCED.finditer(text):
        parts += [turned(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, turned(text[end:])])


def reference(names: list[str]) -> tuple[dict[str, str], list[Any]]:
    """Pages of the API reference, and their part of the navigation, by package."""
    written = {f"api/{name}.md": f"---\ntitle: {name}\n---\n\n::: {name}\n" for name in names}
    top: list[Any] = []
    groups: dict[str, list[Any]] = {}
    for name in names:
        package = ".".join(name.split(".")[:2])
        packed = package != name or any(other.startswith(f"{name}.") for other in names)
        place = groups.setdefault(package, []) if packed and name != PACKAGE else top
        place.append({name.removeprefix(f"{PACKAGE}."): f"api/{name}.md"})
    return written, [
        {PACKAGE: top},
        *({name.split(".")[1]: pages} for name, pages in groups.items()),
    ]


def gather(folder: Path) -> Path:
    """Writes all pages and the configuration below `folder`; returns the configuration's file."""
    shutil.rmtree(folder, ignore_errors=True)
    known, (api, api_nav) = pages(), reference(modules())
    written = {
        place: relinked((ROOT / source).read_text(encoding="utf-8"), source, known)
        for source, place in known.items()
    }
    for place, text in (written | api).items():
        file = folder / "pages" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs/assets", folder / "pages/assets")
    config = yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    if unnamed := sorted(set(known.values()) - named):
        config["nav"].append({"More": unnamed})
    config["nav"].append({"API": api_nav})
    config |= {"docs_dir": "pages", "site_dir": "site"}
    handler = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    handler["paths"] = [str(ROOT)]
    handler["options"]["extensions"] = [str(ROOT / "docs/field_comments.py")]
    file = folder / "mkdocs.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def main() -> int:
    """Builds the site; returns the exit status: not 0 where there was any warning."""
    parser = argparse.ArgumentParser(description="Builds the documentation site.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/docs", help="folder to work in; emptied first"
    )
    file = gather(parser.parse_args().out)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(file)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    told = re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr)
    print(told.partition("Traceback")[0].rstrip())
    # What griffe finds wrong with a docstring does not make Zensical fail.
    return built.returncode or int("griffe: " in told)


if __name__ == "__main__":
    sys.exit(main())
