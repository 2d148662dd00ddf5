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
# # 5. Looking inside
#
# Which experts speak for which images, and what an answer depends on.
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
# The line to change for another model:

# %%
MODEL = "runs/quick/stage3/model"

# %% [markdown]
# ## Who speaks
#
# Every token of every question goes through the router, layer by layer. The command counts which
# expert it sends them to, for each modality (rows of the table are drawn alike from each).

# %%
# !python -m medmoe_jax.analyse --model-path {MODEL} --data runs/quick/data/test.json \
#     --image-folder runs/quick/data/images --limit 40 --out runs/experts/all

# %%
from IPython.display import Image, display

display(Image("runs/experts/all/loads.png", width=900))

# %% [markdown]
# Image tokens should go to the expert of their modality. Words say little about it, and go where
# they like: the router was trained on the modality of the whole, and reads each token by itself.

# %%
display(Image("runs/experts/all/router.png", width=700))

# %% [markdown]
# ## One answer taken apart
#
# Which patches does an answer depend on? The command hides parts of the image, or follows the
# gradient, and then *tests* the result: if the patches that it names matter, hiding them first must
# hurt the answer more than hiding others.

# %%
# !python -m medmoe_jax.analyse --model-path {MODEL} --out runs/experts/one \
#     --image runs/quick/data/images/test_000014.png --ask "Is there a lesion?"

# %%
display(Image("runs/experts/one/overlay.png", width=700))

# %%
display(Image("runs/experts/one/experts.png", width=700))

# %% [markdown]
# The test: the probability of the answer while patches are hidden, the named ones first, and in
# random orders. Curves that lie on each other mean that the picture above explains nothing.

# %%
display(Image("runs/experts/one/deletion.png", width=500))

# %% [markdown]
# `runs/experts/*/analysis.json` has all numbers. `--faithfulness N` repeats the test over N
# questions, which is what to look at before believing any single picture.
