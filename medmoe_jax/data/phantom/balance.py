"""Selection of questions such that their texts say nothing about their answers.

For every question text each answer is asked equally often, exactly. A model that cannot see the
image is therefore at chance, whatever it knows about the question. Sparing use of each image comes
second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from medmoe_jax.data.phantom.questions import KINDS, Question

# Share of the questions by kind (order of KINDS), closed and open. Lesions are asked about most.
CLOSED = (0.12, 0.12, 0.12, 0.16, 0.22, 0.10, 0.11, 0.05)
OPEN = (0.16, 0.16, 0.16, 0.0, 0.22, 0.16, 0.09, 0.05)
SHARES: dict[bool, Mapping[str, float]] = {
    True: dict(zip(KINDS, CLOSED, strict=True)),
    False: dict(zip(KINDS, OPEN, strict=True)),
}


def select(
    asked: Sequence[Sequence[Question]],
    total: int,
    rng: np.random.Generator,
    capacity: Sequence[int] | None = None,
    shares: Mapping[bool, Mapping[str, float]] = SHARES,
) -> list[list[Question]]:
    """Chooses about `total` of the questions, half of them closed, the same number for each answer
    of a text.

    Args:
      asked: the possible questions of each image.
      total: number of questions wanted. Fewer come back where a rare fact runs out; rounding gives
        a few more.
      rng: source of the choice.
      capacity: wanted number of questions of each image, as weights; None: equal.
      shares: closed or not -> kind -> share of the questions.

    Returns:
      The chosen questions of each image, in random order.
    """
    pools: dict[tuple[bool, str], dict[str, dict[str, list[int]]]] = {}
    for number, image in enumerate(asked):
        for question in image:
            texts = pools.setdefault((question.closed, question.kind), {})
            texts.setdefault(question.text, defaultdict(list))[question.answer].append(number)
    weight = np.ones(len(asked)) if capacity is None else np.asarray(capacity, np.float64)
    used = np.zeros(len(asked))
    chosen: list[list[Question]] = [[] for _ in asked]
    for closed in (True, False):
        for kind, share in shares[closed].items():
            texts = {
                text: pool
                for text, pool in pools.get((closed, kind), {}).items()
                if len(pool) > 1  # with one answer alone, the text would give it away
            }
            places = sum(len(pool) for pool in texts.values())
            if not places:
                continue
            for text, pool in texts.items():
                # The same number for every text and answer of a kind, hence the same for all
                # answers of a text.
                wanted = max(1, round(total / 2 * share / places))
                each = min(wanted, *(len(numbers) for numbers in pool.values()))
                for answer, numbers in pool.items():
                    candidates = np.asarray(numbers)
                    rank = used[candidates] / weight[candidates] + 0.5 * rng.random(len(candidates))
                    for number in candidates[np.argsort(rank)[:each]]:
                        chosen[number].append(Question(text, answer, kind, closed))
                        used[number] += 1
    return [[image[i] for i in rng.permutation(len(image))] for image in chosen]


def blind_scores(train: Sequence[Question], test: Sequence[Question]) -> tuple[float, float]:
    """How far the question alone gets: the most frequent training answer of the same text is given
    on the test set.

    Returns:
      Accuracy on closed questions, and mean recall of answer words on open ones; unseen texts count
      as wrong.
    """
    seen: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for question in train:
        seen[question.text][question.answer] += 1
    guess = {text: max(counts, key=lambda a: counts[a]) for text, counts in seen.items()}
    closed, recall = [], []
    for question in test:
        words, said = question.answer.split(), guess.get(question.text, "").split()
        if question.closed:
            closed.append(said == words)
        else:
            recall.append(sum(word in said for word in words) / len(words))
    return float(np.mean(closed)), float(np.mean(recall))
