"""Generation on the CPU beside PyTorch: prefill, decode and whole answers a second.

Both sides have the same random weights, and before anything is timed their scores must agree to
1e-3 and their greedy ids exactly. They are timed in turn, in one process, after runs that do
not count (compilation); a figure is the ratio of the medians. The peer is `torch_peer.py`.

    python benchmarks/generation.py --out runs/benchmark
    python benchmarks/generation.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from timing import Figure, alternate, conditions, markdown
from torch_peer import CACHES, Peer

from medmoe_jax import generate, sampling
from medmoe_jax.config import LlmConfig, ModelConfig, MoeConfig, VisionConfig
from medmoe_jax.data import images, phantom, templates, tokens
from medmoe_jax.demo.checkpoints import make_tokenizer
from medmoe_jax.model import Model
from medmoe_jax.models import layers, medmoe

PARTS = ("prefill", "decode", "predict")
TOLERANCE = 1e-3  # of scores
GOALS = {"prefill, batch 1": 1.3, "prefill, batch 8": 1.3, "decode, batch 1": 2.0, "predict": 3.0}


@dataclass(frozen=True)
class Size:
    """What is measured: the model, and how much of it."""

    llm: LlmConfig
    vision: VisionConfig
    new: int  # ids of an answer in the decode figures
    questions: int  # of the predict figure
    answer: int  # ids of an answer there
    text: int = 128  # text tokens of a prompt, beside those of one image
    experts: int = 4


FULL = Size(
    LlmConfig(
        family="stablelm",
        vocab=8192,
        width=512,
        layers=8,
        ffn=1408,
        heads=8,
        kv_heads=8,
        rotary_fraction=0.25,
    ),
    VisionConfig(image_size=112, patch_size=14, width=96, layers=3, heads=3, ffn=384),
    new=64,
    questions=32,
    answer=32,
)
QUICK = replace(
    FULL,
    llm=replace(FULL.llm, width=64, layers=2, ffn=176, heads=4, kv_heads=4),
    new=8,
    questions=8,
    answer=8,
)


class Sides:
    """Both sides with the same weights."""

    def __init__(self, size: Size, folder: Path, clock: Callable[[], float]):
        self.size, self.clock = size, clock
        moe = MoeConfig(experts=size.experts, top_k=1, placement="sparse")
        self.cfg = ModelConfig(vision=size.vision, llm=size.llm, moe=moe).validate()
        make_tokenizer(phantom.texts(0, 200), folder)
        tokenizer = tokens.load_tokenizer(folder, size.llm.family)
        params = weights(self.cfg, tokenizer.eos_token_id)
        self.peer = Peer.filled(self.cfg, params)
        self.cache = "dynamic"  # the peer's faster cache, see `choose_cache`
        ours = jax.tree.map(jnp.asarray, generate.for_generation(params, self.cfg))
        edge = size.vision.image_size
        spec = images.ImageSpec(resize=edge, crop=edge)
        self.model = Model(
            params=ours,
            config=self.cfg,
            tokenizer=tokenizer,
            spec=spec,
            template=size.llm.family,
            dtype=jnp.dtype(jnp.float32),
        )

    def prompts(self, rows: int) -> tuple[dict[str, np.ndarray], tuple[torch.Tensor, ...]]:
        """Random prompts of an image and text ids, as each side reads them."""
        rng, patches = np.random.default_rng(0), self.cfg.vision.patches
        edge = self.cfg.vision.image_size
        ids = rng.integers(0, self.cfg.llm.vocab, (rows, patches + self.size.text), np.int32)
        place = np.full_like(ids, -1)
        place[:, :patches] = np.arange(patches)
        pixels = rng.integers(0, 256, (rows, 1, edge, edge, 3), np.uint8)
        batch = {"tokens": ids, "image_pos": place, "mask": np.ones_like(ids, bool)}
        text = torch.from_numpy(ids[:, patches:].astype(np.int64))
        return batch | {"images": pixels}, (text[:, :0], torch.from_numpy(pixels[:, 0]), text)

    def jax_prefill(self, rows: int) -> tuple[float, generate.State]:
        """Seconds and what was read."""
        batch = self.prompts(rows)[0]
        start = self.clock()
        state, _ = generate.read(
            self.model.params, self.cfg, batch, dtype=jnp.float32, room=self.size.new
        )
        jax.block_until_ready(state)
        return self.clock() - start, state

    def torch_prefill(self, rows: int, cache: str) -> tuple[float, Any, Any]:
        """Seconds, scores and cache."""
        _, prompt = self.prompts(rows)
        start = self.clock()
        room = self.cfg.vision.patches + self.size.text + self.size.new
        kept = self.peer.new_cache(cache, room)
        logits = self.peer.prefill(*prompt, kept)
        return self.clock() - start, logits, kept

    def jax_decode(self, rows: int) -> tuple[float, np.ndarray]:
        """Seconds for all ids but the first, and all ids."""
        _, state = self.jax_prefill(rows)
        knobs = sampling.knobs(sampling.Sampling(), range(rows))
        pairs = generate.answers(
            self.model.params,
            self.cfg,
            state,
            jnp.int32(-1),
            knobs,
            max_new=self.size.new,
            every=self.size.new,
            dtype=jnp.float32,
        )
        jax.block_until_ready(next(pairs))
        start = self.clock()
        _, found = next(pairs)
        ids = np.asarray(found.ids)
        return self.clock() - start, ids[:, : self.size.new]

    def torch_decode(self, rows: int, cache: str) -> tuple[float, np.ndarray]:
        """Seconds for all ids but the first, and all ids."""
        _, logits, kept = self.torch_prefill(rows, cache)
        start = self.clock()
        ids = self.peer.decode(logits, kept, self.size.new).numpy()
        return self.clock() - start, ids

    def jax_predict(self, questions: list[str], files: list[Path]) -> tuple[float, list[Any]]:
        """Seconds and the ids of every answer; eight questions at once, sorted by length."""
        how = sampling.Sampling(max_new_tokens=self.size.answer)
        start = self.clock()
        replies = self.model.generate(questions, files, how, batch_size=8)
        return self.clock() - start, [list(reply.ids) for reply in replies]

    def torch_predict(self, questions: list[str], files: list[Path]) -> tuple[float, list[Any]]:
        """Seconds and the ids of every answer; one question at a time, as the official script."""
        model, found = self.model, []
        end = model.tokenizer.eos_token_id
        start = self.clock()
        for question, file in zip(questions, files, strict=True):
            text = templates.prompt(model.template, question, images=1)
            ids = tokens.encode_prompt(text, model.tokenizer)
            spot = ids.index(tokens.IMAGE_ID)
            before, after = (torch.tensor([part]) for part in (ids[:spot], ids[spot + 1 :]))
            pixels = torch.from_numpy(images.load_image(file, model.spec))[None]
            kept = self.peer.new_cache(self.cache, self.size.answer + 64 + len(ids))
            logits = self.peer.prefill(before, pixels, after, kept)
            answer = self.peer.decode(logits, kept, self.size.answer, end)[0].tolist()
            model.tokenizer.decode(answer, skip_special_tokens=True)
            found.append(answer)
        return self.clock() - start, found


def weights(cfg: ModelConfig, eos: int) -> dict[str, Any]:
    """Random parameters, biases and norms included; no answer ends early: the end word scores 0."""
    tree = layers.initialise(jax.random.key(0), medmoe.leaves(cfg))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda a: np.asarray(a) + rng.normal(0, 0.02, a.shape).astype(np.float32), tree
    )
    params["llm"]["lm_head"]["kernel"][:, eos] = 0.0
    return params


def write_questions(size: Size, folder: Path) -> tuple[list[str], list[Path]]:
    """Questions of several lengths, each with an image file."""
    rng = np.random.default_rng(2)
    words = " ".join(phantom.texts(1, 50)).split()
    questions, files = [], []
    for i in range(size.questions):
        first, length = rng.integers(len(words) - 100), rng.integers(5, 70)
        questions.append(" ".join(words[first : first + length]))
        files.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)).save(files[-1])
    return questions, files


def check(sides: Sides, rows: int) -> None:
    """Raises AssertionError where the sides do not compute the same."""
    _, state = sides.jax_prefill(rows)
    for cache in CACHES:
        _, logits, _ = sides.torch_prefill(rows, cache)
        error = float(np.abs(np.asarray(state.logits) - logits.numpy()).max())
        assert error < TOLERANCE, f"batch {rows}: scores differ by {error:.1e}"
        ids = sides.torch_decode(rows, cache)[1]
        assert np.array_equal(ids, sides.jax_decode(rows)[1]), f"batch {rows}: other ids ({cache})"


def choose_cache(sides: Sides, rows: int) -> str:
    """The peer's faster KV cache at this batch size, from three runs each."""
    best = {c: min(sides.torch_decode(rows, c)[0] for _ in range(3)) for c in CACHES}
    return min(best, key=best.__getitem__)


def measure(sides: Sides, repeats: int, patience: float, folder: Path, only: Any) -> list[Figure]:
    """The figures asked for; prints each when it is there."""
    figures = []

    def add(name: str, unit: str, amount: float, ours: Any, theirs: Any) -> None:
        times = max(3, repeats // 3) if unit == "answers/s" else repeats
        found = alternate(lambda: ours()[0], lambda: theirs()[0], times, patience)
        figures.append(Figure(name, unit, amount, *found, GOALS.get(name.split(" (")[0])))
        print("  ".join(figures[-1].cells()), file=sys.stderr, flush=True)

    for rows in (1, 8) if {"prefill", "decode"} & set(only) else (1,):
        check(sides, rows)
        cache = choose_cache(sides, rows)
        if rows == 1:
            sides.cache = cache
        if "prefill" in only:
            ours, theirs = partial(sides.jax_prefill, rows), partial(sides.torch_prefill, rows)
            add(f"prefill, batch {rows}", "ms", rows, ours, partial(theirs, cache))
        if "decode" in only:
            ours, theirs = partial(sides.jax_decode, rows), partial(sides.torch_decode, rows)
            amount = rows * (sides.size.new - 1)
            name = f"decode, batch {rows} ({cache} cache)"
            add(name, "tokens/s", amount, ours, partial(theirs, cache))
    if "predict" in only:
        asked = write_questions(sides.size, folder)
        ours, theirs = partial(sides.jax_predict, *asked), partial(sides.torch_predict, *asked)
        assert ours()[1] == theirs()[1], "predict: the answers differ"
        name = "predict (batch 8 against one by one)"
        add(name, "answers/s", len(asked[0]), ours, theirs)
    return figures


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description="Generation on the CPU beside PyTorch.")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--one-thread", action="store_true", help="CPU time on one core")
    parser.add_argument("--questions", type=int, default=FULL.questions, help="to predict")
    wait = "seconds for each figure to wait for quiet moments of the machine"
    parser.add_argument("--patience", type=float, default=0.0, help=wait)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder for generation.md and generation.json")
    args = parser.parse_args()
    if args.one_thread:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores
    torch.set_num_threads(1 if args.one_thread else 2)
    clock = time.process_time if args.one_thread else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        size = QUICK if args.quick else replace(FULL, questions=args.questions)
        sides = Sides(size, Path(scratch) / "tokenizer", clock)
        where = conditions(torch.get_num_threads()) | {
            "parameters": sum(p.numel() for p in sides.peer.parameters()),
            "seconds": "CPU" if args.one_thread else "wall",
            "prompt": f"{sides.cfg.vision.patches} image + {size.text} text tokens",
            "size": asdict(sides.size),
        }
        repeats = 3 if args.quick else args.repeats
        figures = measure(sides, repeats, args.patience, Path(scratch), args.only)
    text = markdown(figures, where)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "generation.md").write_text(text)
        table = [asdict(f) | {"ratio": f.ratio, "quartiles": f.spread} for f in figures]
        data = {"conditions": where, "figures": table}
        (args.out / "generation.json").write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
