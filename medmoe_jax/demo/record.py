"""Runs an exported PyTorch folder on real questions and records what it computes.

    python -m medmoe_jax.demo.record --torch DIR --question-file F --image-folder D --out IO

The file has the format that `python -m medmoe_jax.convert check` reads, so the JAX model can be
held against the PyTorch files it was written to. The PyTorch side is `convert/torch_reference.py`,
built of Hugging Face's modules. Needs the [torch] extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medmoe_jax.data import images, sources, templates, tokens


def record(folder: Path, questions: Path, image_folder: Path, out: Path, rows: int) -> None:
    """Writes inputs and outputs of `rows` questions, and a greedy answer to the first."""
    import torch
    from safetensors.numpy import save_file

    from medmoe_jax.convert import torch_reference

    model = torch_reference.load(folder)
    family = "phi" if "phi" in model.config["model_type"] else "stablelm"
    tokenizer = tokens.load_tokenizer(folder, family)
    spec = images.read_image_spec(folder / "clip" / "preprocessor_config.json", "pad")
    samples = sources.read_samples([questions], image_folder).samples[:rows]
    encoded = [
        tokens.encode(templates.render(family, sample.turns), tokenizer) for sample in samples
    ]
    length = max(len(row.ids) for row in encoded)
    ids = np.full((len(encoded), length), tokenizer.pad_token_id, np.int64)
    labels = np.full_like(ids, tokens.IGNORE)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(encoded):
        n = len(row.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = row.ids, row.labels, True
    pixels = np.stack(
        [
            images.normalise(images.load_image(images.find_image(image_folder, name), spec), spec)
            for sample in samples
            for name in sample.images
        ]
    ).transpose(0, 3, 1, 2)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
    inputs["pixel_values"] = np.ascontiguousarray(inputs["pixel_values"])
    question = templates.prompt(family, samples[0].turns[0][1], images=len(samples[0].images))
    prompt = np.array([tokens.encode_prompt(question, tokenizer)], np.int64)
    first = inputs["pixel_values"][: len(samples[0].images)]
    with torch.no_grad():
        outputs = model(**{k: torch.from_numpy(v) for k, v in inputs.items()})
        new, logits = model.generate_greedy(
            torch.from_numpy(prompt), torch.from_numpy(first), max_new_tokens=8
        )
    found = {k: v.numpy() for k, v in outputs.items()} | {
        "gen.image.input_ids": prompt,
        "gen.image.pixel_values": first,
        "gen.image.new_ids": new.numpy(),
        "gen.image.step_logits": logits.numpy(),
    }
    save_file(inputs | {k: v.copy(order="C") for k, v in found.items()}, out)
    print(f"{out}: {len(samples)} questions through {folder}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", type=Path, required=True, help="official-layout folder")
    parser.add_argument("--question-file", type=Path, required=True)
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    record(args.torch, args.question_file, args.image_folder, args.out, args.rows)


if __name__ == "__main__":
    main()
