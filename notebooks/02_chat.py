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
# # 2. Asking it
#
# Loading a model, asking about an image, and seeing how sure it is and which expert spoke.
#
# **Not for clinical use.**

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
# ## The model
#
# By default the miniature that this command makes (three minutes on two CPU cores, at once if
# `01_tour` has run). It was trained so shortly that many of its answers are wrong.

# %%
# !python -m medmoe_jax.demo --quick --workdir runs/quick

# %% [markdown]
# To ask the real model change the line below to its folder: one that `medmoe_jax.convert` or
# training wrote, or the PyTorch folder as it was downloaded, with its CLIP folder in `load(...,
# vision=...)`. The one of Phi-2 has 6 billion parameters, 12 GB in 16 bits, and that of StableLM-2
# 3.3 billion, 6.6 GB: they are read into main memory first. `load(..., bits=8)` or `bits=4` keeps
# half or a quarter of it on the GPU.

# %%
MODEL = "runs/quick/stage3/model"

# %%
import json

import matplotlib.pyplot as plt
from PIL import Image

import medmoe_jax

model = medmoe_jax.load(MODEL)
short = medmoe_jax.Sampling(max_new_tokens=16)

# %% [markdown]
# ## One question
#
# `picture` may be any PNG, JPEG, DICOM or NIfTI file.

# %%
picture = "runs/quick/data/images/test_000014.png"

figure, axes = plt.subplots(figsize=(3, 3))
axes.imshow(Image.open(picture), cmap="gray")
axes.axis("off")

reply = model.generate("Which modality is shown?", picture, short)
print(reply.text)

# %% [markdown]
# A reply has more than its text:
#
# - `confidence`: the probability of the whole answer, 0 to 1; it says how sure the model is, not
#   how right;
# - `modality`: what the router takes the image for, which is which expert speaks;
# - `finished`: whether the answer ended by itself.

# %%
print(f"confidence {reply.confidence:.0%}, finished: {reply.finished}")
for name, share in reply.modality.items():
    print(f"{name:10s} {share:6.1%} {'#' * round(40 * share)}")

# %% [markdown]
# ## Closed questions
#
# With `options` each of the given answers gets its probability among them. Close to 50 % means:
# guessing.

# %%
reply = model.generate("Is there a lesion?", picture, short, options=("yes", "no"))
print(reply.text, {name: f"{share:.0%}" for name, share in reply.options.items()})

# %% [markdown]
# ## Many at once
#
# Lists are answered in batches. The router's answer for one image of each modality:

# %%
rows = json.loads(Path("runs/quick/data/test.json").read_text())
first = {row["modality"]: row for row in reversed(rows)}
files = [f"runs/quick/data/images/{row['image']}" for row in first.values()]
replies = model.generate(["Which organ is shown?"] * len(files), files, short)

figure, panels = plt.subplots(2, len(files), figsize=(12, 5.2), height_ratios=(3, 1.2))
for column, truth, file, reply in zip(panels.T, first, files, replies, strict=True):
    column[0].imshow(Image.open(file), cmap="gray")
    column[0].set_title(f"{truth}\n{reply.text} ({reply.confidence:.0%})", fontsize=10)
    column[0].axis("off")
    column[1].barh(list(reply.modality), list(reply.modality.values()))
    column[1].set(xlim=(0, 1), xlabel="router")
    column[1].invert_yaxis()
figure.tight_layout()

# %% [markdown]
# ## A conversation
#
# `chat` keeps what was said and shown; its memory of the image is not computed again.

# %%
chat = model.chat(short)
for question, shown in (
    ("Which modality is shown?", picture),
    ("Is there a lesion?", None),
):
    reply = chat.ask(question, shown)
    print(f"USER: {question}\nASSISTANT: {reply.text}  ({reply.confidence:.0%})\n")

# %% [markdown]
# ## Does it look at the image?
#
# A model can answer from the words of a question alone. So show it nothing, and see whether it
# minds: an answer that stays as sure as it was owes little to the image.

# %%
import numpy as np

blank = np.zeros((224, 224, 3), np.uint8)
for name, shown in (("the image", picture), ("a black image", blank)):
    reply = model.generate("Which modality is shown?", shown, short)
    print(f"{name:14s} {reply.text} ({reply.confidence:.0%})")

# %% [markdown]
# On a command line, all this is `python -m medmoe_jax.chat --model-path MODEL --image FILE`, and
# for files of questions `python -m medmoe_jax.predict`.
