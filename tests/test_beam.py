"""Beam search, and greedy answers with the repetition penalty, against Hugging Face's generate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_folders import make_llm, make_tokenizer  # noqa: E402

from medmoe_jax import beam, generate, sampling  # noqa: E402
from medmoe_jax.checkpoint import load_model  # noqa: E402
from medmoe_jax.config import ModelConfig  # noqa: E402
from medmoe_jax.convert import to_jax  # noqa: E402
from medmoe_jax.data import merge  # noqa: E402
from medmoe_jax.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compile")

NEW = 9
LENGTHS = (5, 1, 8)
PAD = 3


class Pair(NamedTuple):
    """The same model twice."""

    theirs: Any
    params: Any
    cfg: ModelConfig


@pytest.fixture(scope="module", params=["phi", "stablelm"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random language model without experts."""
    root = tmp_path_factory.mktemp(request.param)
    theirs = make_llm(root / "src", request.param)
    make_tokenizer(root / "src")
    to_jax(root / "src", root / "jax")
    params, meta = load_model(root / "jax")
    return Pair(theirs, generate.for_generation(params, meta.model), meta.model)


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> list[list[int]]:
    """Prompts of unlike length."""
    rng = np.random.default_rng(4)
    return [rng.integers(4, pair.cfg.llm.vocab, n).tolist() for n in LENGTHS]


def hugging_face(pair: Pair, prompt: list[int], eos: int, **settings: Any) -> list[int]:
    """New ids of one prompt, up to the end included."""
    choices = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos if eos >= 0 else None,
        pad_token_id=PAD,
        bos_token_id=1,
        **settings,
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = pair.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=choices
        )
    new = found[0, len(prompt) :].tolist()
    return new[: new.index(eos) + 1] if eos in new else new


def read(pair: Pair, prompts: list[list[int]], how: Sampling) -> generate.State:
    rows = [merge.expand(prompt, None, 1) for prompt in [*prompts, []]]  # and a row of padding
    batch = {k: v for k, v in merge.pad_rows(rows, 8).items() if k != "labels"}
    state, _ = generate.read(
        pair.params,
        pair.cfg,
        generate.left_padded(batch),
        dtype=jnp.float32,
        room=NEW,
        penalised=how.repetition_penalty != 1,
    )
    return state


def search(pair: Pair, prompts: list[list[int]], eos: int, **settings: Any) -> Any:
    how = Sampling(max_new_tokens=NEW, **settings)
    *found, nothing = beam.search(
        pair.params, pair.cfg, read(pair, prompts, how), eos, how, jnp.float32
    )
    assert nothing == ([], [])
    return found


def greedy(pair: Pair, prompts: list[list[int]], eos: int, **settings: Any) -> list[list[int]]:
    how = Sampling(max_new_tokens=NEW, **settings)
    *_, (_, found) = generate.answers(
        pair.params,
        pair.cfg,
        read(pair, prompts, how),
        jnp.int32(eos),
        sampling.knobs(how, [0] * (len(prompts) + 1)),
        max_new=NEW,
        every=4,
        dtype=jnp.float32,
    )
    ids, lengths = jax.device_get((found.ids, found.lengths))
    return [row[:n].tolist() for row, n in zip(ids[: len(prompts)], lengths, strict=False)]


@pytest.fixture(scope="module")
def ends(pair: Pair, prompts: list[list[int]]) -> list[int]:
    """No end, and two ids that answers hold at different places: ends that are met."""
    said = greedy(pair, prompts, -1)
    return [-1, said[0][1], said[1][3]]


def test_greedy(pair: Pair, prompts: list[list[int]], ends: list[int]) -> None:
    """Every row of a batch is what Hugging Face says to it alone; with the penalty as well."""
    met = 0
    for eos in ends:
        for penalty in (1.0, 0.7, 1.5):
            want = [hugging_face(pair, p, eos, repetition_penalty=penalty) for p in prompts]
            assert greedy(pair, prompts, eos, repetition_penalty=penalty) == want
            met += sum(len(row) < NEW for row in want)
    assert met > 3


def test_beam_search(pair: Pair, prompts: list[list[int]], ends: list[int]) -> None:
    """Ids are Hugging Face's, with ends that are met and not, and three length penalties."""
    lengths, unlike_greedy = set(), 0
    widths = (2, 4) if pair.cfg.llm.family == "phi" else (3,)
    for eos in ends:
        plain = greedy(pair, prompts, eos)
        for width, power in [(w, p) for w in widths for p in (0.5, 1.0, 2.0)]:
            found = search(pair, prompts, eos, beams=width, length_penalty=power)
            for prompt, (ids, log_probs), simple in zip(prompts, found, plain, strict=True):
                want = hugging_face(
                    pair, prompt, eos, num_beams=width, length_penalty=power, early_stopping=False
                )
                assert ids == want, (eos, width, power)
                assert len(log_probs) == len(ids) and max(log_probs) <= 0
                lengths.add(len(ids))
                unlike_greedy += ids != simple
    assert len(lengths) > 2 and unlike_greedy > 3


def test_penalty_in_beam_search(pair: Pair, prompts: list[list[int]], ends: list[int]) -> None:
    changed = 0
    for eos in ends[::2]:
        plain = search(pair, prompts, eos, beams=3)
        found = search(pair, prompts, eos, beams=3, repetition_penalty=1.4)
        for prompt, (ids, _), (before, _) in zip(prompts, found, plain, strict=True):
            want = hugging_face(
                pair, prompt, eos, num_beams=3, repetition_penalty=1.4, early_stopping=False
            )
            assert ids == want
            changed += ids != before
    assert changed


def test_probabilities_are_the_models_own(pair: Pair, prompts: list[list[int]]) -> None:
    """Not those that the penalty makes of them."""
    found = search(pair, prompts, -1, beams=3, repetition_penalty=1.4)
    for prompt, (ids, log_probs) in zip(prompts, found, strict=True):
        whole = torch.tensor([prompt + ids])
        with torch.no_grad():
            scores = pair.theirs(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = scores[torch.arange(len(ids)), torch.tensor(ids)]
        np.testing.assert_allclose(log_probs, want.numpy(), atol=1e-4)


def test_batch_is_its_rows(pair: Pair, prompts: list[list[int]], ends: list[int]) -> None:
    """Longer ones of the batch change nothing, also where a row ends early."""
    together = search(pair, prompts, ends[1], beams=3)
    for prompt, (ids, log_probs) in zip(prompts, together, strict=True):
        ((alone, shares),) = search(pair, [prompt], ends[1], beams=3)
        assert alone == ids
        np.testing.assert_allclose(shares, log_probs, atol=1e-5)
