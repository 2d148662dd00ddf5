"""Looks inside a model: `python -m medmoe_jax.analyse --model-path DIR --data MANIFEST`.

Three things, each where it is asked for:

* expert loads by layer, modality and kind of token, the router's entropy, posterior and accuracy,
  over the rows of `--data` (a MoE model);
* one question taken apart, `--question N|ID` of `--data`, or `--image F --ask TEXT`: its experts,
  the patches that its answer depends on, and what hiding them costs beside hiding others;
* the same test over `--faithfulness N` questions of `--data`.

What is found is printed, and with `--out DIR` written: analysis.json, analysis.md and figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from medmoe_jax import compilation
from medmoe_jax import model as loaded
from medmoe_jax.analyse import deletion, explain, inputs, plots, routing, saliency, text
from medmoe_jax.analyse.explain import Explanation, Settings
from medmoe_jax.config import ConfigError, natural
from medmoe_jax.data import images, sources, templates
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.medical import flags
from medmoe_jax.data.problems import SHOWN, DataError, Problem, settle
from medmoe_jax.data.records import Records, is_records
from medmoe_jax.data.sources import Sample
from medmoe_jax.metrics import MissingExtra
from medmoe_jax.model import Model

DENSE = (
    "This is a dense model (stage 1 or 2): it has no experts and no router, so there are no expert "
    "loads. Explanations work."
)
Made = TypeVar("Made")
REMEDY = {"remedy": "--on-error skip", "place": "--image-folder"}


def pictures(sample: Sample, image_folder: str) -> list[Any]:
    """The images of a sample as `explain` takes them: files, or pictures out of records."""
    if is_records(sample.file):
        record = Records(sample.file)[sample.row]
        pairs = zip(record.images, sample.images, strict=True)
        return [images.decode(content, name) for content, name in pairs]
    folder = sources.image_folder_of(sample.file, image_folder)
    return [images.find_image(folder, name) for name in sample.images]


def question_of(sample: Sample) -> str:
    """Its first question, without <image>."""
    return sample.turns[0][1].replace(templates.IMAGE_TOKEN, "").strip()


def usable(
    samples: Sequence[Sample],
    make: Callable[[Sample], Made],
    what: str,
    on_error: str,
    problems: list[Problem],
) -> Iterator[Made]:
    """`make` of every sample; those that cannot be used go into `problems`, at the end.

    Raises:
      DataError: at the end, as `problems.settle`.
    """
    found: list[Problem] = []
    for sample in tqdm(samples, desc=what, unit="row", dynamic_ncols=True):
        try:
            made = make(sample)
        except DataError as error:
            found.append(Problem(sample.file, sample.row, sample.id, str(error)))
        else:
            yield made
    settle(found, on_error, len(samples), **REMEDY)
    problems += [problem for problem in found if problem not in problems]


class Analysis:
    """What is asked for, found piece by piece: figures for JSON, Markdown, and PNG."""

    def __init__(self, out: Path | None, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        self.figures: dict[str, Any] = {}
        self.parts: list[str] = []
        self.written: list[Path] = []
        self.out = out

    def loads(
        self, model: Model, samples: Sequence[Sample], folder: str, on_error: str, size: int
    ) -> None:
        """Expert loads and the router."""
        if model.config.moe is None:
            self.parts.append(DENSE)
            return
        store = ImageStore(folder, model.spec, keep=False)
        make = partial(inputs.of_sample, model, store=store)
        rows = usable(samples, make, "loads", on_error, self.problems)
        batches = inputs.batches(rows, size)
        found = routing.trace(model.params, model.config, batches, model.dtype)
        self.figures["routing"] = report = routing.report(found)
        self.parts.append(text.loads(report, found))
        if self.out:
            self.written.append(plots.loads(report, self.out / "loads.png"))
            self.written.append(plots.router(report, self.out / "router.png"))

    def explanation(self, found: Explanation) -> None:
        """One question."""
        self.figures["explanation"] = report = explain.report(found)
        self.parts.append(text.explanation(found))
        if self.out and found.curve is not None:
            self.written.append(plots.overlay(found, self.out / "overlay.png"))
            self.written.append(plots.deletion(report["deletion"], self.out / "deletion.png"))
        if self.out and found.experts is not None:
            self.written.append(plots.experts(found, self.out / "experts.png"))

    def faithfulness(
        self, model: Model, samples: Sequence[Sample], folder: str, on_error: str, how: Settings
    ) -> None:
        """The deletion figures of the model's own answers to many questions.

        Raises:
          DataError: none of them has an image.
        """
        seen = [sample for sample in samples if sample.images]
        if not seen:
            raise DataError("--faithfulness needs rows with images; there are none")

        def curve_of(sample: Sample) -> tuple[deletion.Curve, str]:
            shown = pictures(sample, folder)
            found = explain.explain(model, question_of(sample), shown, settings=how)
            assert found.curve is not None
            return found.curve, str(sample.images)

        pairs = usable(seen, curve_of, "faithfulness", on_error, self.problems)
        curves, clusters = zip(*pairs, strict=True)
        report = deletion.aggregate(curves, clusters, seed=how.seed)
        self.figures["faithfulness"] = {"method": how.method} | report
        self.parts.append(text.faithfulness(report, how.method))
        if self.out:
            self.written.append(plots.deletion(report, self.out / "faithfulness.png"))

    def finish(self, settings: dict[str, Any]) -> None:
        """Writes JSON and Markdown, and prints."""
        if self.problems:
            self.figures["left_out"] = [dataclasses.asdict(one) for one in self.problems]
            lines = [f"* {one}" for one in self.problems[:SHOWN]]
            rest = len(self.problems) - len(lines)
            lines += [f"* and {rest} more, see analysis.json"] if rest else []
            self.parts.append("\n".join([f"{len(self.problems)} rows were left out:", *lines]))
        shown = "\n".join(self.parts)
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            content = json.dumps(
                {"settings": settings} | self.figures, indent=1, ensure_ascii=False, allow_nan=False
            )
            for name, whole in (("analysis.json", content + "\n"), ("analysis.md", shown)):
                self.written.append(self.out / name)
                self.written[-1].write_text(whole, encoding="utf-8")
        print(shown)
        if self.written:
            print(f"Written: {', '.join(map(str, self.written))}")


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError or MissingExtra where the options do not go together."""
    if bool(args.image) != bool(args.ask) and not args.ask:
        raise ConfigError("--image needs --ask TEXT, the question about it")
    if args.ask and args.question is not None:
        raise ConfigError("give --question (a row of --data) or --ask, not both")
    if not args.data and (args.question is not None or args.faithfulness or not args.ask):
        raise ConfigError("give --data MANIFEST, or --image F --ask TEXT")
    if args.answer and not (args.ask or args.question is not None):
        raise ConfigError("--answer belongs to one question; give --question or --ask as well")
    for name in ("limit", "faithfulness"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it cannot be negative")
    if args.out:
        plots.need_matplotlib()


def analyse(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    check(args)
    how = Settings(
        method=args.method,
        steps=args.steps,
        draws=args.draws,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    view = flags.view(args)
    compilation.keep(args.compilation_cache)
    samples: list[Sample] = []
    problems: list[Problem] = []
    if args.data:
        rows = sources.read_rows([args.data], args.image_folder)
        settle(rows.problems, args.on_error, rows.total, **REMEDY)
        samples, problems = rows.samples, rows.problems
    chosen = inputs.find(samples, args.question) if args.question is not None else None
    model = loaded.load(
        args.model_path,
        template=args.conv_mode,
        dtype=args.dtype,
        aspect=args.image_aspect,
        view=view,
        bits=args.bits,
    )
    done, folder = Analysis(args.out, problems), args.image_folder
    if chosen:
        shown = pictures(chosen, folder)
        asked = question_of(chosen)
        done.explanation(explain.explain(model, asked, shown, args.answer, how))
    elif args.ask:
        done.explanation(explain.explain(model, args.ask, args.image, args.answer, how))
    else:
        drawn = inputs.draw(samples, args.limit, args.seed)
        done.loads(model, drawn, folder, args.on_error, args.batch_size)
    if args.faithfulness:
        drawn = inputs.draw(samples, args.faithfulness, args.seed)
        done.faithfulness(model, drawn, folder, args.on_error, how)
    done.finish({k: str(v) for k, v in sorted(vars(args).items())})


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m medmoe_jax.analyse",
        description="Which experts speak, what the router thinks, what an answer depends on.",
    )
    add = parser.add_argument
    loaded.add_flags(parser)
    add("--data", default="", help="rows with answers: manifest.jsonl, JSON, or a record folder")
    add("--image-folder", default="", help="default: `images` beside the data")
    add("--out", type=Path, help="folder for analysis.json, analysis.md and figures")
    add("--limit", type=int, default=0, help="rows drawn, each modality alike; 0 = all")
    add("--batch-size", type=int, default=8)
    add(
        "--question", metavar="N|ID", help="explain this row of --data: its id, or its place from 0"
    )
    add("--image", action="append", default=[], help="explain a question about it; repeatable")
    add("--ask", default="", metavar="TEXT", help="the question about --image")
    add("--answer", default="", help="explain this answer; default: the model's own")
    methods = saliency.METHODS
    add(
        "--method", choices=methods, default=methods[0], help="of the overlay; default: %(default)s"
    )
    add("--steps", type=int, default=Settings.steps, help="of integrated gradients")
    add("--draws", type=int, default=Settings.draws, help="random orders of hiding patches")
    add("--faithfulness", type=int, default=0, metavar="N", help="test the overlays of N questions")
    add("--seed", type=natural, default=0, help="of everything that is drawn")
    add("--image-aspect", choices=("pad", "square"), default="pad")
    add("--on-error", choices=("error", "skip"), default="error", help="what a bad row does")
    compilation.add_flag(parser)
    flags.add_view(parser)
    return parser


def main() -> None:
    """Command line."""
    try:
        analyse(arguments().parse_args())
    except (*loaded.FAULTS, MissingExtra, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
