# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A tour of Med-MoE
#
# Med-MoE answers questions about medical images with a small language model. What is special: every
# second layer holds several *experts*, one for each kind of image (CT, MRI, X-ray, pathology), and
# a *router* that looks at the image and says which expert speaks.
#
# This notebook shows the whole of it in miniature: pictures, the four phases of training, the parts
# of the model, and a few answers. It needs no data and no account, and runs on a CPU, a GPU or a
# TPU.
#
# **Not for clinical use.** The images are drawn by a program; they show no patient.

# %%
# Where the project lies: no public address is known yet, so put in that of your copy.
REPOSITORY = "https://github.com/YOUR-NAME/medmoe_jax"

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

devices = "CPU"
if shutil.which("nvidia-smi"):
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False)
    devices = found.stdout.strip() if found.returncode == 0 else devices
elif any(Path("/dev").glob("accel*")) or any("TPU_" in name for name in os.environ):
    devices = "TPU"
print("running on:", devices)
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

if importlib.util.find_spec("medmoe_jax") is None:  # as on Colab; takes a few minutes, once
    extras = ["torch", "eval", "plots"]
    if devices == "TPU":
        extras.append("tpu")
    elif devices != "CPU":  # CUDA 13 needs driver 580 or newer
        driver = int(devices.splitlines()[0].split(", ")[1].split(".")[0])
        extras.append("cuda" if driver >= 580 else "cuda12")
    source = Path("medmoe_jax_source").resolve()
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(source)], check=True)
    wanted = f"{source}[{','.join(extras)}]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", wanted], check=True)
    sys.path.insert(0, str(source))

# %% [markdown]
# ## A model in three minutes
#
# The real model starts from CLIP and Phi-2 and trains for days. This one has 2.6 million
# parameters. The command draws *phantom studies* (images of which every fact is known), makes tiny
# checkpoints in the files that CLIP and Phi-2 come in, and takes the same path as the real thing.
# It prints each command it runs.
#
# It is short: some three minutes on two CPU cores. So it knows little: X-rays and pathology it
# tells apart from everything, CT from MRI hardly, and of held-out questions it answers some 60 %
# rightly, where guessing gets about half of the closed ones. Without `--quick` it trains until nine
# of ten are right, which takes ten minutes.
#
# Run again, it finds everything done.

# %%
# !python -m medmoe_jax.demo --quick --workdir runs/quick

# %% [markdown]
# ## What it sees
#
# Two studies of each modality, with the caption and one of the questions that belong to them.

# %%
import json
import textwrap

import matplotlib.pyplot as plt
from PIL import Image

from medmoe_jax.config import MODALITIES

DATA = Path("runs/quick/data")
rows = json.loads((DATA / "train_all.json").read_text())
captions = {row["image"]: row for row in json.loads((DATA / "alignment.json").read_text())}


def talk(row):
    """Question and answer of a row (LLaVA-Med spells the key of its captions differently)."""
    turns = row.get("conversations") or row["conversatons"]
    return turns[0]["value"].replace("<image>", "").strip(), turns[1]["value"]


figure, panels = plt.subplots(2, 4, figsize=(13, 8.4), layout="constrained")
for column, modality in zip(panels.T, MODALITIES, strict=True):
    chosen = {row["image"]: row for row in rows if row["modality"] == modality}
    for axes, (name, row) in zip(column, chosen.items(), strict=False):
        question, answer = talk(row)
        axes.imshow(Image.open(DATA / "images" / name), cmap="gray")
        lines = [*textwrap.wrap(talk(captions[name])[1], 38), "", *textwrap.wrap(question, 38)]
        axes.set_title("\n".join([*lines, f"- {answer}"]), fontsize=8, loc="left")
        axes.axis("off")

# %% [markdown]
# Questions are *closed* (yes or no, or one of two choices) or *open*:

# %%
for row in rows[:8]:
    question, answer = talk(row)
    print(f"{row['answer_type']:7s} {row['modality']:10s} {question}  ->  {answer}")

# %% [markdown]
# ## Four phases
#
# | phase | trains | learns from |
# |---|---|---|
# | stage 1 | the projector, which turns image patches into "words" | captions |
# | stage 2 | projector and language model | conversations |
# | router | one linear layer | the modality of some images |
# | stage 3 | the experts, made as copies of the stage-2 layers | single questions |
#
# Each is a file in `configs/` and one command. What each of them trained, and what became of the
# loss:

# %%
from medmoe_jax import checkpoint

RUN = Path("runs/quick")
for phase in ("stage1", "stage2", "router", "stage3"):
    meta = checkpoint.read_meta(RUN / phase / "model")
    if meta.phases:
        record = meta.phases[-1]
        share = record["parameters"]["trained"] / record["parameters"]["all"]
        print(f"{phase}: {record['rows']['used']} rows, {share:.1%} of all parameters trained")

figure, panels = plt.subplots(1, 4, figsize=(13, 2.8), layout="constrained")
for axes, phase in zip(panels, ("stage1", "stage2", "router", "stage3"), strict=True):
    log = (RUN / phase / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], marker=".")
    axes.set(title=phase, xlabel="step", ylim=(0, None))
_ = panels[0].set_ylabel("loss")

# %% [markdown]
# The loss of the router is that of naming the modality; the others are of the next word.
#
# ## The parts
#
# Everything the model is: a CLIP *vision tower*, the *projector*, and the language model with its
# experts. An image becomes one token for each patch. A token goes through one chosen expert and
# through the *meta expert*, which is always on; the other experts rest. So the model holds more
# than it uses at a time.

# %%
meta = checkpoint.read_meta(RUN / "stage3/model")
params, _ = checkpoint.load_model(RUN / "stage3/model")
moe = params["llm"]["moe"]


def count(tree):
    """Numbers in a nested dict of arrays."""
    return sum(map(count, tree.values())) if isinstance(tree, dict) else tree.size


print(f"one image = {meta.model.vision.patches} tokens")
print(f"experts in layers {meta.model.moe_layers} of {meta.model.llm.layers}")
sizes = {
    "vision tower": count(params["vision"]),
    "projector": count(params["projector"]),
    "language model without experts": count(params["llm"]) - count(moe),
    "4 experts": count(moe["experts"]),
    "meta expert": count(moe["meta"]),
    "router": count(moe["router"]),
}
width = max(map(len, sizes))
for name, number in sizes.items():
    print(f"{name:{width}s} {number:12,d}")

# %% [markdown]
# ## Ask it
#
# Held-out images, one of each modality. Beside each: the question, the answer with its probability,
# the truth, and which modality the router takes the image for.

# %%
import medmoe_jax

model = medmoe_jax.load(RUN / "stage3/model")
held_out = json.loads((DATA / "test.json").read_text())
shown = [next(row for row in held_out if row["modality"] == name) for name in MODALITIES]
questions = [talk(row)[0] for row in shown]
files = [DATA / "images" / row["image"] for row in shown]
replies = model.generate(questions, files, medmoe_jax.Sampling(max_new_tokens=16))

figure, panels = plt.subplots(2, 4, figsize=(13, 5), height_ratios=(2.2, 1), layout="constrained")
for column, row, file, reply in zip(panels.T, shown, files, replies, strict=True):
    question, answer = talk(row)
    lines = [*textwrap.wrap(question, 38), f"says: {reply.text} ({reply.confidence:.0%})"]
    column[0].imshow(Image.open(file), cmap="gray")
    column[0].set_title("\n".join([*lines, f"truth: {answer}"]), fontsize=9, loc="left")
    column[0].axis("off")
    column[1].barh(list(reply.modality), list(reply.modality.values()))
    column[1].set(xlim=(0, 1), xlabel="router")
    column[1].invert_yaxis()

# %% [markdown]
# Wrong answers are no accident here: three minutes are short. `02_chat` asks more questions,
# `03_finetune` trains on data of your own, `04_to_pytorch` goes back to PyTorch, and `05_experts`
# looks inside.
