"""Settings of a study: data, phases of both language models, and what is varied."""

# No `from __future__ import annotations`: command-line overrides read the types of the fields.

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.data import phantom

LLMS = {"phi": "Phi-2", "stablelm": "StableLM-2"}
NAMED = ("tests", "classify_tests")  # roles whose files are NAME=FILE


@dataclass
class Phases:
    """The phases of one language model, as the files of `configs/` have them."""

    init: str = ""  # model folder to start from (`convert to-jax`); "" = pretrained on phantoms
    stage1: RunConfig = field(default_factory=RunConfig)
    stage2: RunConfig = field(default_factory=RunConfig)
    router: RunConfig = field(default_factory=RunConfig)
    stage3: RunConfig = field(default_factory=RunConfig)


@dataclass
class FilesConfig:
    """One's own data; with `tune` empty, phantom data are made."""

    alignment: tuple[str, ...] = ()  # phase 1
    instruct: tuple[str, ...] = ()  # phase 2 and the router
    instruct_heldout: tuple[str, ...] = ()  # the router's accuracy
    tune: tuple[str, ...] = ()  # phase 3
    classify: tuple[str, ...] = ()  # phase 3 with classification (Table 3)
    classify_more: tuple[str, ...] = ()  # what data scaling adds (Table 11)
    tests: tuple[str, ...] = ()  # NAME=FILE, the paper's order: VQA-RAD, SLAKE, PathVQA
    classify_tests: tuple[str, ...] = ()  # NAME=FILE
    image_folder: str = ""  # "" = `images` beside each file


@dataclass
class PhantomConfig:
    """Phantom data of a study, and the pretraining of tiny models on phantoms of their own."""

    train: int = 800  # images
    test: int = 160  # images
    size: int = 112  # pixels
    train_questions: float = 1.6  # of each kind of file, an image
    test_questions: float = 1.5
    vision_studies: int = 2400  # images of the vision tower's pretraining, in hundreds
    vision_steps: int = 1200
    language_steps: int = 500


@dataclass
class AnswersConfig:
    """How test questions are answered."""

    rows: int = 0  # most questions of a test file; 0 = all
    batch_size: int = 32
    max_new_tokens: int = 16


@dataclass
class StudyConfig:
    """A study. Seeds vary the phantom data, the order of rows and the routers' start; the models
    that phase 1 starts from are the same for all, as the paper's are."""

    files: FilesConfig = field(default_factory=FilesConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    phi: Phases = field(default_factory=Phases)
    stablelm: Phases = field(default_factory=Phases)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    lora_ranks: tuple[int, ...] = (256, 128)  # Table 7, in its order
    aux_coef: float = 0.01  # of the load-balancing loss where the router learns in phase 3
    labels: tuple[int, ...] = (5, 10, 25, 50, 100)  # Figure 6: router labels of a modality
    bootstrap: int = 1000  # draws of an interval
    compilation_cache: str = ""  # folder; "" = `compiled` in the workdir

    def phases(self, llm: str) -> Phases:
        """The phases of `phi` or `stablelm`."""
        return {"phi": self.phi, "stablelm": self.stablelm}[llm]


def check(cfg: StudyConfig) -> None:
    """Raises ConfigError where settings of a study cannot work; those of phases are checked when
    they run."""
    lists, answers = (cfg.lora_ranks, cfg.labels), cfg.answers
    least = min(answers.batch_size, answers.max_new_tokens, *(min(n, default=0) for n in lists))
    if least < 1 or answers.rows < 0 or cfg.bootstrap < 0:
        raise ConfigError(
            f"config.lora_ranks is {cfg.lora_ranks}, labels {cfg.labels}, bootstrap "
            f"{cfg.bootstrap} and answers {answers}; ranks, labels, batch_size and max_new_tokens "
            "must be 1 or more (at least one each), rows and bootstrap 0 or more"
        )
    for role in NAMED:
        entries = getattr(cfg.files, role)
        names = [entry.partition("=")[0] for entry in entries]
        odd = [entry for entry in entries if not re.fullmatch(r"[^=/\\]+=.+", entry)]
        if odd or len(set(names)) < len(names):
            raise ConfigError(
                f"config.files.{role} is {entries}; each entry is NAME=FILE, as in "
                "VQA-RAD=data/test_rad.json, and no name comes twice"
            )
    made = cfg.phantom
    try:
        phantom.check(made.train, made.test, made.size)
    except ValueError as error:
        raise ConfigError(f"config.phantom: {error}") from error
    if made.vision_studies < 1 or min(made.vision_steps, made.language_steps) < 1:
        raise ConfigError(f"config.phantom: pretraining needs studies and steps, 1 or more: {made}")
    if min(made.train_questions, made.test_questions) <= 0:
        raise ConfigError(f"config.phantom: questions of an image must be more than 0: {made}")


def override(config: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with some fields changed, named by dotted paths ("model.moe.top_k").

    Raises:
      ConfigError: there is no such field.
    """
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if not hasattr(config, name):
            raise ConfigError(f"{type(config).__name__} has no field {name!r} (from {path!r})")
        new = override(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: new})
    return config


def changed(config: Any, default: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of `default`, JSON. What is left out stays
    the same where a later version has more fields."""
    found = {}
    for field_ in dataclasses.fields(config):
        value, usual = getattr(config, field_.name), getattr(default, field_.name)
        if value == usual:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            same = usual if type(usual) is type(value) else type(value)()
            found[field_.name] = changed(value, same)
        else:
            found[field_.name] = list(value) if isinstance(value, tuple) else value
    return found
