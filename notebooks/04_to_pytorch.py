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
# # 4. Back to PyTorch
#
# A model that was trained in JAX becomes the folder that Med-MoE's own PyTorch classes load, and
# gives the same numbers there.
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
# The miniature (three minutes on two CPU cores, at once if another notebook has run):

# %%
# !python -m medmoe_jax.demo --quick --workdir runs/quick

# %% [markdown]
# The line to change for another model. In float32, as they are compared below, the two copies of
# the real ones need 50 GB (Phi-2) or 26 GB (StableLM-2) of main memory.

# %%
MODEL = "runs/quick/stage3/model"
EXPORTED = "runs/exported"

# %% [markdown]
# ## Convert
#
# One table drives both directions: each tensor is used once, and shapes are checked before anything
# is written.

# %%
shutil.rmtree(EXPORTED, ignore_errors=True)

# %%
# !python -m medmoe_jax.convert to-torch {MODEL} {EXPORTED}

# %%
for file in sorted(Path(EXPORTED).rglob("*")):
    if file.is_file():
        print(f"{file.stat().st_size:12,d}  {file}")

# %% [markdown]
# ## The same question to both
#
# PyTorch first. `torch_reference` reads the folder strictly, as the official classes do, and is
# built of Hugging Face's own modules; the official classes themselves need the libraries of 2024.

# %%
import numpy as np
import torch

from medmoe_jax.convert import torch_reference
from medmoe_jax.data import images, templates, tokens

QUESTION, PICTURE = "Is there a lesion?", "runs/quick/data/images/test_000000.png"

theirs = torch_reference.load(EXPORTED)
family = "phi" if "phi" in theirs.config["model_type"] else "stablelm"
tokenizer = tokens.load_tokenizer(Path(EXPORTED), family)
spec = images.read_image_spec(Path(EXPORTED) / "clip/preprocessor_config.json", "pad")

prompt = templates.prompt(family, QUESTION, images=1)
print(prompt)
ids = np.array([tokens.encode_prompt(prompt, tokenizer)])
pixels = images.normalise(images.load_image(PICTURE, spec), spec)[None].transpose(0, 3, 1, 2)

with torch.no_grad():
    outputs = theirs(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.bool),
        labels=torch.full(ids.shape, tokens.IGNORE),
        pixel_values=torch.from_numpy(np.ascontiguousarray(pixels)),
    )
torch_logits = outputs["out.logits"].numpy()
print("logits of PyTorch:", torch_logits.shape)

# %% [markdown]
# And JAX, on the same ids and pixels:

# %%
import jax

from medmoe_jax.convert import check

params, config = check.read(MODEL)
inputs = {"input_ids": ids, "pixel_values": np.ascontiguousarray(pixels)}
with jax.default_matmul_precision("highest"):  # else an accelerator rounds the factors
    jax_logits = check.activations(params, config, inputs, "the question")["out.logits"]

difference = np.abs(jax_logits - torch_logits)
print(f"largest difference of a logit: {difference.max():.1e}, of {np.abs(jax_logits).max():.1f}")
assert difference.max() < 1e-4

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(4.2, 4), layout="constrained")
axes.plot(torch_logits[0, -1], jax_logits[0, -1], ".", markersize=4)
axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, zorder=0)
_ = axes.set(xlabel="PyTorch", ylabel="JAX", title="logits of the first word of the answer")

# %% [markdown]
# The words that both think of first:

# %%
for name, logits in (("PyTorch", torch_logits), ("JAX", jax_logits)):
    best = logits[0, -1].argsort()[::-1][:3]
    print(f"{name:8s}", [tokenizer.decode([int(i)]) for i in best])

# %% [markdown]
# `python -m medmoe_jax.convert check MODEL --io FILE` compares all activations, layer by layer,
# with those that a PyTorch run recorded.
