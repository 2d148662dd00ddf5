"""Command line: `python -m medmoe_jax.data.phantom --out DIR [--seed 0] [--train 1600] [--test 240]
[--size 224] [--sheet FILE.png]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from medmoe_jax.config import natural
from medmoe_jax.data.phantom.sheet import contact_sheet
from medmoe_jax.data.phantom.write import write


def main(arguments: list[str] | None = None) -> int:
    """Writes a data set, a contact sheet, or both. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medmoe_jax.data.phantom",
        description="Writes synthetic medical studies: PNG images and LLaVA-Med-style JSON.",
    )
    parser.add_argument("--out", help="folder to write; made if absent")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--train", type=int, default=1600, help="number of training images")
    parser.add_argument("--test", type=int, default=240, help="number of held-out images")
    parser.add_argument("--size", type=int, default=224, help="longer side of an image, pixels")
    parser.add_argument(
        "--train-questions", type=float, default=4.0, help="rows of train_all.json an image"
    )
    parser.add_argument(
        "--test-questions", type=float, default=3.0, help="rows of test.json an image"
    )
    parser.add_argument(
        "--signs", action="store_true", help="also questions that take a rule of the modality"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--sheet", help="PNG file: samples of every modality with questions")
    options = parser.parse_args(arguments)
    if not options.out and not options.sheet:
        parser.error("nothing to do: give --out DIR, --sheet FILE.png or both")
    if options.sheet:
        Path(options.sheet).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(options.seed, size=options.size).save(options.sheet)
        print(f"contact sheet: {options.sheet}")
    if options.out:
        start = time.perf_counter()
        try:
            counts = write(
                options.out,
                seed=options.seed,
                train=options.train,
                test=options.test,
                size=options.size,
                questions_per_image=(options.train_questions, options.test_questions),
                workers=options.workers,
                signs=options.signs,
            )
        except (ValueError, OSError) as error:
            parser.error(str(error))
        seconds = time.perf_counter() - start
        for name, rows in counts.items():
            print(f"{rows:8d}  {name}")
        print(f"{seconds:8.1f}  seconds, {counts['images'] / seconds:.0f} images a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
