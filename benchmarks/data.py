"""Batches a second beside a PyTorch DataLoader that does the same work, and what a step waits for.

Both sides read the same files: decode, pad to a square, resize as CLIP, tokenise, collate. Before
anything is timed the first batches must be equal: ids exactly, pixels to 1e-6. The PyTorch side
normalises on the host, as the official code; ours sends uint8, which the device normalises.

    python benchmarks/data.py --out runs/benchmark
    python benchmarks/data.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import conditions
from torch.utils.data import DataLoader, Dataset

from medmoe_jax.config import DataConfig
from medmoe_jax.data import images, merge, phantom, pipeline, templates, tokens
from medmoe_jax.data.sources import Sample
from medmoe_jax.demo.checkpoints import make_tokenizer

SIZES = ((512, 512), (640, 480), (1024, 1024), (300, 400))  # pixels, width and height
PATCHES, EDGE = 576, 336
WORKERS = (0, 1, 2)
READ_AHEAD = 6  # batches that may be there already when a timing starts


@dataclass
class Figure:
    """Both sides with one number of workers, medians of the rounds."""

    workers: int
    ours: float  # samples a second, nothing else to do
    theirs: float
    ours_waiting: float  # share of a step spent waiting for its batch
    theirs_waiting: float


def write_samples(folder: Path, number: int) -> list[Sample]:
    """Questions about images of several sizes, half of them JPEG."""
    rng, texts = np.random.default_rng(0), list(phantom.texts(0, 200))
    samples = []
    for i in range(number):
        width, height = SIZES[i % len(SIZES)]
        coarse = rng.integers(0, 256, (height // 16, width // 16), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        name = f"{i}.{('png', 'jpg')[i % 8 < 4]}"
        picture.convert("RGB").save(folder / name)
        question, answer = texts[2 * i % len(texts)], texts[(2 * i + 1) % len(texts)]
        turns = (("human", f"<image>\n{question}"), ("gpt", answer))
        samples.append(Sample(str(i), (name,), turns, "open", -1, "", "", i))
    return samples


class Peer(Dataset):
    """The official data set's work, sample by sample, with Pillow and PyTorch."""

    def __init__(self, samples: list[Sample], folder: Path, tokenizer: Any, spec: images.ImageSpec):
        self.samples, self.folder, self.tokenizer = samples, folder, tokenizer
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (spec.mean, spec.std))
        self.fill = tuple(int(255 * m) for m in spec.mean)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sample = self.samples[i]
        coded = tokens.encode(templates.render("phi", sample.turns), self.tokenizer)
        picture = Image.open(self.folder / sample.images[0]).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), self.fill)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        square = square.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        pixels = (pixels - self.mean) / self.std
        return torch.tensor(coded.ids), torch.tensor(coded.labels), pixels


def collate(parts: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    """Pads on the right, as the official collator."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([part[0] for part in parts], batch_first=True)
    labels = pad([part[1] for part in parts], batch_first=True, padding_value=-100)
    return {"ids": ids, "labels": labels, "images": torch.stack([part[2] for part in parts])}


def check(ours: dict[str, np.ndarray], peer: Peer, spec: images.ImageSpec) -> None:
    """Raises AssertionError where a batch is not what the peer makes of the same samples."""
    for row, sample in enumerate(ours["row"].tolist()):
        ids, labels, pixels = peer[sample]
        text = merge.expand(ids.tolist(), labels.tolist(), PATCHES)
        size = len(text.tokens)
        assert np.array_equal(ours["tokens"][row, :size], text.tokens), sample
        assert np.array_equal(ours["labels"][row, :size], text.labels), sample
        made = images.normalise(ours["images"][row, 0], spec).transpose(2, 0, 1)
        np.testing.assert_allclose(made, pixels.numpy(), atol=1e-6)


def consume(batches: Iterator[Any], count: int, busy: float) -> tuple[float, float]:
    """Seconds of `count` steps, and of waiting for their batches; those read ahead do not count.

    A step is `busy` seconds in which the host is free, as where an accelerator computes.
    """
    for _ in range(READ_AHEAD):
        next(batches)
    waited, start = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        if busy:
            time.sleep(busy)
    return time.perf_counter() - start, waited


def measure(args: argparse.Namespace, folder: Path) -> list[Figure]:
    """All numbers of workers, both sides in turn."""
    samples = write_samples(folder, args.samples)
    make_tokenizer(phantom.texts(0, 200), folder / "tokenizer")
    tokenizer = tokens.load_tokenizer(folder / "tokenizer", "stablelm")
    spec = images.ImageSpec(EDGE, EDGE)
    peer = Peer(samples, folder, tokenizer, spec)
    rows, count = args.batch_size, args.batches

    def ours(workers: int, busy: float) -> tuple[float, float]:
        cfg = DataConfig(image_folder=str(folder), workers=workers)
        stream = pipeline.build(samples, tokenizer, spec, PATCHES, cfg, rows, seed=0, cache_bytes=0)
        with closing(stream):
            check(next(stream), peer, spec)
            return consume(stream, count, busy)

    def theirs(workers: int, busy: float) -> tuple[float, float]:
        loader = DataLoader(
            peer, rows, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True
        )

        def endless() -> Iterator[Any]:
            while True:
                yield from loader

        return consume(endless(), count, busy)

    figures = []
    for workers in WORKERS:
        found: dict[Callable[..., Any], list[tuple[float, float]]] = {ours: [], theirs: []}
        for number in range(args.repeats):
            for side in (ours, theirs) if number % 2 else (theirs, ours):
                seconds, _ = side(workers, 0.0)
                total, waited = side(workers, args.step)
                found[side].append((rows * count / seconds, waited / total))
        medians = [
            [statistics.median(column) for column in zip(*found[side], strict=True)]
            for side in (ours, theirs)
        ]
        (speed, waiting), (other, others_waiting) = medians
        figures.append(Figure(workers, speed, other, waiting, others_waiting))
    return figures


def table(figures: list[Figure], where: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| workers | samples/s | PyTorch | faster | waiting | PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for f in figures:
        shares = f"{f.ours_waiting:.0%} | {f.theirs_waiting:.0%}"
        speeds = f"{f.ours:.1f} | {f.theirs:.1f} | {f.ours / f.theirs:.2f}x"
        lines.append(f"| {f.workers} | {speeds} | {shares} |")
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    about = (
        f"`{where['command']}`; {where['cpu']}, load {where['load'][0]} at the start; {versions}. "
        "Waiting: share of steps in which a device computes "
        f"{where['step']} s and the host is free."
    )
    return "\n".join(lines) + f"\n\n{about}\n"


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description="Batches beside a PyTorch DataLoader.")
    parser.add_argument("--quick", action="store_true", help="few batches: does it run at all?")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=24, help="of one timing")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side")
    parser.add_argument("--step", type=float, default=0.3, help="seconds a device computes")
    parser.add_argument("--out", type=Path, help="folder for data.md and data.json")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.batches, args.repeats = 32, 3, 1
    torch.set_num_threads(1)
    where = conditions(1) | {"step": args.step, "batch_size": args.batch_size}
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args, Path(scratch))
    text = table(figures, where)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "data.md").write_text(text)
        data = {"conditions": where, "figures": [asdict(figure) for figure in figures]}
        (args.out / "data.json").write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
