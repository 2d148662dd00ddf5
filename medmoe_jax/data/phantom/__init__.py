"""Generator of phantom medical studies: synthetic images with exact answers, in the file formats of
the real data sets.

`python -m medmoe_jax.data.phantom --out DIR` writes PNG files and JSON; `generate` gives images
with their facts without writing anything, `texts` the language that goes with them. Only numpy and
Pillow are needed. The images imitate what a modality looks like; they are no medical data and teach
no medicine. Start reading at `facts.py`.
"""

from medmoe_jax.data.phantom.facts import QUADRANTS, Facts, Lesion, lesion_map
from medmoe_jax.data.phantom.questions import Question, caption, questions
from medmoe_jax.data.phantom.render import draw_facts, draw_image, generate
from medmoe_jax.data.phantom.write import check, readings, texts, write

__all__ = [
    "QUADRANTS",
    "Facts",
    "Lesion",
    "Question",
    "caption",
    "check",
    "draw_facts",
    "draw_image",
    "generate",
    "lesion_map",
    "questions",
    "readings",
    "texts",
    "write",
]
