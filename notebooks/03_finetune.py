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
# # 3. Training on your own data
#
# From a table of questions to figures: prepare, check, train, answer, evaluate. Here the table is
# made of phantom studies; bring your own by changing one line.
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
# ## Where to start
#
# Stage 3 starts from a model that has been through the first phases and whose router is trained.
# The miniature (three minutes on two CPU cores, at once if another notebook has run):

# %%
# !python -m medmoe_jax.demo --quick --workdir runs/quick

# %% [markdown]
# The line to change for a real model: its size (`phi2` or `stablelm`) and the folder of its router
# phase. The experts of Phi-2 need 11 GB a chip on eight TPU v5e (`docs/scaling.md`): no free
# runtime trains that.

# %%
SIZE, START = "tiny", "runs/quick/router/model"

# %% [markdown]
# ## Your table
#
# A CSV file with the columns `image`, `question`, `answer` is all it takes. `answer_type`,
# `modality` and `split` help. This one gets the first questions about 120 training images and 40
# others:

# %%
import csv
import json

TABLE, IMAGES = Path("runs/mine/questions.csv"), Path("runs/quick/data/images")

rows = []
for split, name, most in (("train", "train_all", 240), ("test", "test", 60)):
    for row in json.loads(Path(f"runs/quick/data/{name}.json").read_text())[:most]:
        question, answer = (turn["value"] for turn in row["conversations"])
        question = question.replace("<image>", "").strip()
        rows.append((row["image"], question, answer, row["modality"], split))

TABLE.parent.mkdir(parents=True, exist_ok=True)
with TABLE.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("image", "question", "answer", "modality", "split"))
    writer.writerows(rows)
print(*TABLE.read_text().splitlines()[:4], sep="\n")

# %% [markdown]
# ## Prepare
#
# Into the format that everything else reads. Rows that cannot be used stop it with a list.

# %%
# !python -m medmoe_jax.data.prepare custom --source {TABLE} --images {IMAGES} \
#     --licence CC0-1.0 --out runs/mine/data

# %%
from IPython.display import Image, display

display(Image("runs/mine/data/sheet.png", width=900))

# %% [markdown]
# ## Check
#
# What would spoil a run: broken images, doubled rows, test images in the training set, and with a
# tokenizer rows that are too long. Errors give it exit status 1.

# %%
# !python -m medmoe_jax.data.check runs/mine/data --out runs/mine/check

# %% [markdown]
# ## Train
#
# Stage 3: the FFN of every second layer is copied into four experts and the meta expert, and only
# these train. Killed and started again it goes on where it was.

# %%
STEPS = 40

import medmoe_jax

CONFIG = os.path.relpath(Path(medmoe_jax.__file__).parents[1] / "configs/stage3.py")

# %%
# !python -m medmoe_jax.train --config {CONFIG}:{SIZE} --workdir runs/mine/stage3 \
#     --config.init={START} --config.data.files="('runs/mine/data/train.jsonl',)" \
#     --config.optim.steps={STEPS} --config.log.every=1 --config.log.tensorboard=False

# %%
import matplotlib.pyplot as plt

log = Path("runs/mine/stage3/metrics.jsonl").read_text()
lines = [json.loads(line) for line in log.splitlines()]
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
_ = axes.set(xlabel="step", ylabel="loss of the answers", ylim=(0, None))

# %% [markdown]
# ## Answer and evaluate
#
# Questions about images it has not seen, with the official and the strict figures, each with its 95
# % interval. Sixty questions make the intervals wide: do not read more into the figures than they
# say.

# %%
# !python -m medmoe_jax.predict --model-path runs/mine/stage3/model \
#     --question-file runs/mine/data/test.jsonl --image-folder runs/mine/data/images \
#     --answers-file runs/mine/answers.jsonl --max-new-tokens 16 --batch-size 20

# %%
# !python -m medmoe_jax.evaluate --gt runs/mine/data/test.jsonl --pred runs/mine/answers.jsonl \
#     --out runs/mine/metrics.json

# %%
found = json.loads(Path("runs/mine/metrics.json").read_text())
for name, percent in found["summary"].items():
    if percent is not None:
        low, high = found["summary_ci95"][name]
        n = found["summary_n"][name]
        print(f"{name:26s} {percent:5.1f} %   ({low:.1f} to {high:.1f}, n = {n})")

# %% [markdown]
# ## Say what it is
#
# A model card, from what the phases recorded: data, licences, settings, figures. What is unknown is
# called so.

# %%
# !python -m medmoe_jax.card runs/mine/stage3 --metrics runs/mine/metrics.json --name mine \
#     --out runs/mine/README.md --overwrite

# %%
from IPython.display import Markdown

card = Path("runs/mine/README.md").read_text()
display(Markdown(card.split("---\n", 2)[2]))  # without the part for programs
