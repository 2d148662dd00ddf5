"""Text metrics of answers: the official figures, bug for bug, and strict ones beside them.

`official` gives the figures that published Med-MoE and LLaVA-Med tables contain. They over-count:
a closed answer is right if its text occurs anywhere in the prediction ("no" in "normal"), and
"Exact Match Score" is a kind of precision. `strict` gives figures that mean what they say.
Everything here is a pure function of strings; `evaluation/` reads files, pairs rows and adds
intervals and tables. The official BLEU is nltk's, in the extra `eval`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

OFFICIAL_OPEN = ("open", "OPEN")
OFFICIAL_CLOSED = ("close", "CLOSED")
STRICT_OPEN = ("open", "other", "number")
STRICT_CLOSED = ("close", "closed", "yes/no", "yes", "no")

# Figures that are means over rows -> (kind of row, key in per_sample, place in its list).
FIGURES: dict[str, dict[str, tuple[str, str, int | None]]] = {
    "official": {
        "Exact Match Score": ("open", "exact_match", None),
        "F1 Score": ("open", "f1", None),
        "Precision": ("open", "precision", None),
        "Recall": ("open", "recall", None),
        "BLEU Score (Weight 1)": ("open", "bleu", 0),
        "BLEU Score (Weight 2)": ("open", "bleu", 1),
        "BLEU Score (Weight 3)": ("open", "bleu", 2),
        "yes/no accuracy": ("closed", "closed_correct", None),
        "Closed F1 Score": ("closed", "f1", None),
        "Closed Precision": ("closed", "precision", None),
        "Closed Recall": ("closed", "recall", None),
    },
    "strict": {
        "Closed Accuracy": ("closed", "closed_correct", None),
        "Open Recall": ("open", "recall", None),
        "Open Precision": ("open", "precision", None),
        "Open F1": ("open", "f1", None),
        "Open Exact Match": ("open", "exact_match", None),
    },
}
BLEU_WEIGHTS = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))

NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {word: str(i) for i, word in enumerate(NUMBERS.split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""


class MissingExtra(ImportError):
    """An optional library is absent; the message names the extra that brings it."""


class Answer(NamedTuple):
    """One answered question."""

    reference: str
    prediction: str
    answer_type: str  # as in the data file: open, OPEN, close, CLOSED; strict takes more
    question: str = ""  # for wrong_answers, and for the other options of an either/or question


def official(answers: Iterable[Answer | tuple[str, str, str]]) -> dict[str, Any]:
    """The figures of the official evaluation script.

    Args:
      answers: rows in order; only the answer types open, OPEN, close and CLOSED count, so spelled.

    Returns:
      aggregate_percent: the script's eleven figures by its names, percent; None where there is no
        question of that kind (the script divides by zero there).
      n_open, n_closed, n_ignored: numbers of rows.
      per_sample: one dict a row, empty where the row is ignored: answer_type, f1, precision, recall
        (0..1); open ones also exact_match and bleu (BLEU-1, -2, -3), closed ones closed_correct.

    Raises:
      MissingExtra: nltk is absent.

    Source: official `run_eval.py`, `eval_metrics/`.
    """
    return _report("official", [_official_row(Answer(*answer)) for answer in answers])


def strict(answers: Iterable[Answer | tuple[str, str, str]]) -> dict[str, Any]:
    """Figures with their usual meaning, on whole words.

    Words are runs of letters and digits, lower case, decimals kept whole ("3.5"), without
    articles (but for a closed answer that is one, as "A" of A, B, C and D); number words count as
    digits ("two" is "2").

    * Closed, yes or no: right if the prediction has that word and not the other one. "Yes, there
      is no fluid" has both and is wrong.
    * Closed, otherwise: right if the reference's words occur in the prediction in a row and no
      other option does. Options are read from the question (see `options`); where it names none,
      the first half of the rule decides. Negations ("not left") are not understood.
    * Open recall and precision: share of the distinct words of one side that the other has.
    * Open F1: over words with multiplicity, as in SQuAD. Exact match: the same words in order.

    BLEU is added to them by `evaluation/bleu.py`.

    Args:
      answers: rows in order; answer types open, other, number and close, closed, yes/no, in any
        case.

    Returns:
      aggregate_percent: Closed Accuracy, Open Recall, Open Precision, Open F1, Open Exact Match;
        None where there is no question of that kind.
      n_open, n_closed, n_ignored: numbers of rows.
      per_sample: one dict a row, empty where the row is ignored: answer_type and closed_correct, or
        answer_type, recall, precision, f1 (0..1) and exact_match.
    """
    return _report("strict", [_strict_row(Answer(*answer)) for answer in answers])


def values(variant: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """What each figure is the mean of.

    Args:
      variant: official or strict.
      rows: the `per_sample` of that report.

    Returns:
      One list a figure of `FIGURES`: a value (0..1) a row, None where the row does not count.
    """
    rows = list(rows)
    return {name: [_value(row, *place) for row in rows] for name, place in FIGURES[variant].items()}


def wrong_answers(answers: Iterable[Answer | tuple[str, str, str]]) -> list[dict[str, str]]:
    """Closed questions that `official` counts as wrong, as the official wrong_answers.json has
    them.

    Args:
      answers: rows in order; `question` becomes the prompt, as it is.

    Returns:
      Dicts of prompt, correct_answer and predicted_answer (both lower case).
    """
    rows = [Answer(*answer) for answer in answers]
    return [
        {
            "prompt": row.question,
            "correct_answer": row.reference.lower(),
            "predicted_answer": row.prediction.lower(),
        }
        for row in rows
        if row.answer_type in OFFICIAL_CLOSED
        and row.reference.lower() not in row.prediction.lower()
    ]


def normalize_word(text: str) -> str:
    """Normalisation of the VQA challenge as the official metrics apply it.

    Each punctuation mark vanishes if it touches a space anywhere in the text, or if a comma stands
    between two digits anywhere; else it becomes a space. Of the full stops without a digit after
    them the first 32 vanish. Then: lower case, number words to digits, articles out, apostrophes
    put into contractions.

    Args:
      text: any string.

    Returns:
      Words with single spaces.

    Source: normalize_word in LLaVA-Med's `eval_metrics/glossary.py`, after the VQA evaluation.
    """
    thousands = re.search(r"\d,\d", text)
    marks = {
        mark: "" if thousands or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION
    }
    # 32 is re.UNICODE, which upstream passes where the count belongs.
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(marks)), count=32)
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    spelled = _contractions()
    return " ".join(spelled.get(word, word) for word in words if word not in ARTICLES)


def bleu(reference: Sequence[str], prediction: Sequence[str]) -> list[float]:
    """BLEU of the 1-, the 2- and the 3-grams alone, as the official figures have them.

    Args:
      reference: words.
      prediction: words.

    Returns:
      Three values, 0..1.

    Raises:
      MissingExtra: nltk is absent.

    Source: nltk's sentence_bleu, one weight 1, smoothing method 1 (Chen and Cherry, 2014).
    """
    try:
        from nltk.translate import bleu_score
    except ImportError as error:
        raise MissingExtra("BLEU needs nltk: pip install 'medmoe_jax[eval]'") from error
    smooth = bleu_score.SmoothingFunction().method1
    found = bleu_score.sentence_bleu([list(reference)], list(prediction), BLEU_WEIGHTS, smooth)
    return [float(value) for value in found]  # pyright: ignore[reportGeneralTypeIssues]


def options(question: str) -> list[list[str]]:
    """Options that a question names, as lists of words (see `strict`).

    Args:
      question: its text. Options are what its last [...] or "Options: ..." lists with semicolons,
        as the prompts for MedMNIST, or else with commas, as in LLaVA-Med's "Please choose from the
        following two options: [left, right]"; without a list the words on both sides of each "or",
        where both are followed by the same noun those before it ("left lung or right lung").

    Returns:
      One list of words an option; empty where there are none.
    """
    listed = re.findall(r"\[([^\]]*)\]|options: ([^\s\[](?:[^.?\n]|\.(?=\d))*)", question.lower())
    if listed:
        text = "".join(listed[-1])
        return [split_words(option) for option in text.split(";" if ";" in text else ",")]
    words = split_words(question)
    places = [i for i in range(1, len(words) - 1) if words[i] == "or"]
    return [side for i in places for side in _sides(words, i)]


def split_words(text: str, articles: bool = False) -> list[str]:
    """Words of the strict figures (see `strict`), or those with articles."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['\u2019]", "", text.lower())
    words: list[str] = re.findall(r"\d+\.\d+|[^\W_]+", text)
    kept = words if articles else [word for word in words if word not in ARTICLES]
    return [NUMBER_WORDS.get(word, word) for word in kept]


def contains(words: list[str], part: list[str]) -> bool:
    """Whether `part`, not empty, occurs in `words` in a row."""
    starts = range(len(words) - len(part) + 1)
    return bool(part) and any(words[i : i + len(part)] == part for i in starts)


def _sides(words: list[str], place: int) -> tuple[list[str], list[str]]:
    """What stands on both sides of the "or" at a place of a question."""
    noun, rest = words[place - 1], words[place + 1 : place + 4]
    before = rest.index(noun) if noun in rest and "or" not in rest else 0
    if not 0 < before < place:
        return [noun], rest[:1]
    return words[place - 1 - before : place - 1], rest[:before]


def _official_row(answer: Answer) -> dict[str, Any]:
    if answer.answer_type not in OFFICIAL_OPEN + OFFICIAL_CLOSED:
        return {}
    reference, prediction = answer.reference.lower(), answer.prediction.lower()
    wanted = Counter(normalize_word(reference).split())
    given = Counter(normalize_word(prediction).split())
    # Every occurrence in the prediction of a wanted word counts as found, however often it repeats.
    found = sum(count for word, count in given.items() if word in wanted)
    absent = sum(count for word, count in wanted.items() if word not in given)
    precision = found / given.total() if found else 0.0
    recall = found / (found + absent) if found else 0.0
    row: dict[str, Any] = {
        "answer_type": answer.answer_type,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "precision": precision,
        "recall": recall,
    }
    if answer.answer_type in OFFICIAL_CLOSED:
        return row | {"closed_correct": reference in prediction}
    words = (reference.split(), prediction.split())
    return row | {
        "exact_match": len(wanted.keys() & given.keys()) / given.total() if given else 0.0,
        "bleu": bleu(*words),
    }


def _strict_row(answer: Answer) -> dict[str, Any]:
    kind = answer.answer_type.strip().lower()
    reference, prediction = split_words(answer.reference), split_words(answer.prediction)
    row: dict[str, Any] = {"answer_type": answer.answer_type}
    if kind in STRICT_CLOSED:
        if not reference:  # "A" of A, B, C and D
            reference = split_words(answer.reference, articles=True)
            prediction = split_words(answer.prediction, articles=True)
        yes_no = [["yes"], ["no"]]
        others = yes_no if reference in yes_no else options(answer.question)
        right = contains(prediction, reference)
        for other in others:
            right = right and (contains(reference, other) or not contains(prediction, other))
        return row | {"closed_correct": right}
    if kind in STRICT_OPEN:
        shared = (Counter(reference) & Counter(prediction)).total()
        same = reference == prediction
        both = len(set(reference) & set(prediction))
        return row | {
            "recall": both / len(set(reference)) if reference else float(same),
            "precision": both / len(set(prediction)) if prediction else float(same),
            "f1": 2 * shared / (len(reference) + len(prediction)) if shared else float(same),
            "exact_match": same,
        }
    return {}


@functools.cache
def _contractions() -> dict[str, str]:
    """Spellings with one apostrophe left out -> the full spelling."""
    table = {
        word[:i] + word[i + 1 :]: word
        for word in CONTRACTIONS.split()
        for i, letter in enumerate(word)
        if letter == "'"
    }
    # The challenge's table does this one the other way round.
    return table | {"somebody'd": "somebodyd"}


def _value(row: Mapping[str, Any], kind: str, key: str, place: int | None) -> float | None:
    if "answer_type" not in row or ("closed_correct" in row) != (kind == "closed"):
        return None
    return float(row[key] if place is None else row[key][place])


def _report(variant: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    aggregate: dict[str, float | None] = {}
    for name, column in values(variant, rows).items():
        found = [value for value in column if value is not None]
        aggregate[name] = sum(found) / len(found) * 100 if found else None
    closed = sum("closed_correct" in row for row in rows)
    ignored = sum(not row for row in rows)
    return {
        "aggregate_percent": aggregate,
        "n_open": len(rows) - closed - ignored,
        "n_closed": closed,
        "n_ignored": ignored,
        "per_sample": rows,
    }
