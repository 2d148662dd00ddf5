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
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from timing import Figure, alternate, chosen_clock, conditions, markdown
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


def prompts(cfg: ModelConfig, text: int, rows: int) -> dict[str, np.ndarray]:
    """Random prompts of an image and `text` ids behind it, as `generate.read` takes them."""
    rng, patches, edge = np.random.default_rng(0), cfg.vision.patches, cfg.vision.image_size
    ids = rng.integers(0, cfg.llm.vocab, (rows, patches + text), np.int32)
    place = np.full_like(ids, -1)
    place[:, :patches] = np.arange(patches)
    pixels = rng.integers(0, 256, (rows, 1, edge, edge, 3), np.uint8)
    return {
        "tokens": ids,
        "image_pos": place,
        "mask": np.ones_like(ids, bool),
        "images": pixels,
    }


class Ours:
    """Generation as `predict` and `chat` do it."""

    def __init__(self, model: Model, size: Size, clock: Callable[[], float]):
        self.model, self.size, self.clock = model, size, clock

    def prefill(self, rows: int) -> tuple[float, generate.State]:
        """Seconds and what was read."""
        model = self.model
        batch = prompts(model.config, self.size.text, rows)
        start = self.clock()
        state, _ = generate.read(
            model.params, model.config, batch, dtype=model.dtype, room=self.size.new
        )
        jax.block_until_ready(state)
        return self.clock() - start, state

    def decode(self, rows: int) -> tuple[float, np.ndarray]:
        """Seconds for all ids but the first, and all ids."""
        model = self.model
        _, state = self.prefill(rows)
        knobs = sampling.knobs(sampling.Sampling(), range(rows))
        pairs = generate.answers(
            model.params,
            model.config,
            state,
            jnp.int32(-1),
            knobs,
            max_new=self.size.new,
            every=self.size.new,
            dtype=model.dtype,
        )
        jax.block_until_ready(next(pairs))
        start = self.clock()
        _, found = next(pairs)
        ids = np.asarray(found.ids)
        return self.clock() - start, ids[:, : self.size.new]

    def predict(self, questions: list[str], files: list[Path]) -> tuple[float, list[Any]]:
        """Seconds and the ids of every answer; eight questions at once, sorted by length."""
        how = sampling.Sampling(max_new_tokens=self.size.answer)
        start = self.clock()
        replies = self.model.generate(questions, files, how, batch_size=8)
        return self.clock() - start, [list(reply.ids) for reply in replies]


class Theirs:
    """Generation with the PyTorch peer.

    On a GPU the clock must wait for it, since PyTorch does not.
    """

    def __init__(self, peer: Peer, cfg: ModelConfig, size: Size, clock: Callable[[], float]):
        self.peer, self.cfg, self.size, self.clock = peer, cfg, size, clock
        self.cache = CACHES[0]  # where none is named

    def prefill(self, rows: int, cache: str = "") -> tuple[float, torch.Tensor, Any]:
        """Seconds, scores and cache."""
        batch = prompts(self.cfg, self.size.text, rows)
        text = torch.from_numpy(batch["tokens"][:, self.cfg.vision.patches :].astype(np.int64))
        pixels = torch.from_numpy(batch["images"][:, 0])
        room = batch["tokens"].shape[1] + self.size.new
        start = self.clock()
        kept = self.peer.new_cache(cache or self.cache, room)
        here = (part.to(self.peer.device) for part in (text[:, :0], pixels, text))
        logits = self.peer.prefill(*here, kept)
        return self.clock() - start, logits, kept

    def decode(self, rows: int, cache: str = "") -> tuple[float, np.ndarray]:
        """Seconds for all ids but the first, and all ids."""
        _, logits, kept = self.prefill(rows, cache)
        start = self.clock()
        ids = self.peer.decode(logits, kept, self.size.new).cpu().numpy()
        return self.clock() - start, ids

    def faster_cache(self, rows: int) -> str:
        """The KV cache that is faster at this batch size, from three runs each."""
        best = {c: min(self.decode(rows, c)[0] for _ in range(3)) for c in CACHES}
        return min(best, key=best.__getitem__)

    def predict(
        self, model: Model, questions: list[str], files: list[Path]
    ) -> tuple[float, list[Any]]:
        """Seconds and the ids of every answer; one question at a time, as the official script.

        `model` has tokenizer, template and image settings.
        """
        found, end = [], model.tokenizer.eos_token_id
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


class Sides(NamedTuple):
    """Both sides with the same weights."""

    ours: Ours
    theirs: Theirs


def sides(size: Size, folder: Path, clock: Callable[[], float]) -> Sides:
    """Both sides in float32, with a tokenizer that is written to `folder`."""
    moe = MoeConfig(experts=size.experts, top_k=1, placement="sparse")
    cfg = ModelConfig(vision=size.vision, llm=size.llm, moe=moe).validate()
    make_tokenizer(phantom.texts(0, 200), folder)
    tokenizer = tokens.load_tokenizer(folder, size.llm.family)
    params = weights(cfg, tokenizer.eos_token_id)
    edge = size.vision.image_size
    model = Model(
        params=jax.tree.map(jnp.asarray, generate.for_generation(params, cfg)),
        config=cfg,
        tokenizer=tokenizer,
        spec=images.ImageSpec(resize=edge, crop=edge),
        template=size.llm.family,
        dtype=jnp.dtype(jnp.float32),
    )
    return Sides(Ours(model, size, clock), Theirs(Peer.filled(cfg, params), cfg, size, clock))


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
    ours, theirs = sides
    _, state = ours.prefill(rows)
    for cache in CACHES:
        _, logits, _ = theirs.prefill(rows, cache)
        error = float(np.abs(np.asarray(state.logits) - logits.numpy()).max())
        assert error < TOLERANCE, f"batch {rows}: scores differ by {error:.1e}"
        ids = theirs.decode(rows, cache)[1]
        assert np.array_equal(ids, ours.decode(rows)[1]), f"batch {rows}: other ids ({cache})"


def measure(sides: Sides, repeats: int, patience: float, folder: Path, only: Any) -> list[Figure]:
    """The figures asked for; prints each when it is there."""
    figures = []
    ours, theirs = sides
    size = ours.size

    def add(name: str, unit: str, amount: float, one: Any, other: Any) -> None:
        times = max(3, repeats // 3) if unit == "answers/s" else repeats
        found = alternate(lambda: one()[0], lambda: other()[0], times, patience)
        figures.append(Figure(name, unit, amount, *found, GOALS.get(name.split(" (")[0])))
        print("  ".join(figures[-1].cells()), file=sys.stderr, flush=True)

    for rows in (1, 8) if {"prefill", "decode"} & set(only) else (1,):
        check(sides, rows)
        cache = theirs.faster_cache(rows)
        if rows == 1:
            theirs.cache = cache
        if "prefill" in only:
            one, other = partial(ours.prefill, rows), partial(theirs.prefill, rows, cache)
            add(f"prefill, batch {rows}", "ms", rows, one, other)
        if "decode" in only:
            one, other = partial(ours.decode, rows), partial(theirs.decode, rows, cache)
            amount = rows * (size.new - 1)
            add(f"decode, batch {rows} ({cache} cache)", "tokens/s", amount, one, other)
    if "predict" in only:
        asked = write_questions(size, folder)
        one, other = partial(ours.predict, *asked), partial(theirs.predict, ours.model, *asked)
        assert one()[1] == other()[1], "predict: the answers differ"
        name = "predict (batch 8 against one by one)"
        add(name, "answers/s", len(asked[0]), one, other)
    return figures


def main() -> None:
    """Measures, prints the table and writes it."""
    about = "Generation on the CPU beside PyTorch. On a GPU: accelerator.py."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--one-thread", action="store_true", help="CPU time on one core")
    parser.add_argument("--questions", type=int, default=FULL.questions, help="to predict")
    wait = "seconds for each figure to wait for quiet moments of the machine"
    parser.add_argument("--patience", type=float, default=0.0, help=wait)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder for generation.md and generation.json")
    args = parser.parse_args()
    clock = chosen_clock(args.one_thread)
    torch.set_num_threads(1 if args.one_thread else 2)
    with tempfile.TemporaryDirectory() as scratch:
        size = QUICK if args.quick else replace(FULL, questions=args.questions)
        both = sides(size, Path(scratch) / "tokenizer", clock)
        where = conditions(torch.get_num_threads()) | {
            "parameters": sum(p.numel() for p in both.theirs.peer.parameters()),
            "seconds": "CPU" if args.one_thread else "wall",
            "prompt": f"{size.vision.patches} image + {size.text} text tokens",
            "size": asdict(size),
        }
        repeats = 3 if args.quick else args.repeats
        figures = measure(both, repeats, args.patience, Path(scratch), args.only)
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
