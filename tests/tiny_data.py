"""Small data for tests: a byte-level tokenizer made on the spot, images and JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: Is there a lesion in the left lung? ASSISTANT: yes",
    "What modality was used to take this image? Magnetic resonance imaging.",
]


def save_tokenizer(folder: Path, words: int = 420) -> Path:
    """Writes a byte-level BPE tokenizer with the special words of Phi-2 and StableLM-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[END, "<|reg0|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Writes a random RGB picture of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def row(number: int, answer: object = "yes", **other: object) -> dict:
    """A row with one image 'i<number>.png' and one question."""
    talk = [
        {"from": "human", "value": "<image>\nIs there a lesion?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": f"r{number}", "image": f"i{number}.png", "conversations": talk} | other


def save_rows(path: Path, rows: list) -> Path:
    """Writes rows as JSON, or as JSONL where the name says so."""
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(one, ensure_ascii=False) for one in rows) + "\n"
    else:
        text = json.dumps(rows, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path
