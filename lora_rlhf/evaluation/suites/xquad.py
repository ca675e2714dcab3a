"""XQuAD in English: questions on a paragraph, answered from it; F1 and exact match.

lm-eval's own task needs a module that transformers 5 no longer has; prompt and figures are its.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.evaluation.suites.shares import Measures, Observed

_MAX_NEW_TOKENS = 256  # that of lm-eval's task, which the line break ends much earlier
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """Words of an answer without case, punctuation and articles.

    Source: Rajpurkar et al. 2016, evaluate-v1.1.py.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words; 1 where both have none.

    Source: evaluate-v1.1.py. Deviation: two empty answers agree, as in evaluate-v2.0.py.
    """
    ours, theirs = normalised(answer), normalised(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


def exact_match(answer: str, reference: str) -> float:
    """1 where the words are the same in the same order."""
    return float(normalised(answer) == normalised(reference))


def questions(articles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt and references, one a question, of the articles of a SQuAD file.

    Raises:
        DataError: the file is not of that kind.
    """
    try:
        return [
            {
                "prompt": f"Context: {paragraph['context']}\n\nQuestion: {asked['question']}"
                f"\n\nAnswer:",
                "references": [answer["text"] for answer in asked["answers"]],
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the XQuAD file has not the fields of a SQuAD file ({error!r}). Use it as published."
        ) from error


def measures(engine: Engine, asked: Sequence[dict[str, Any]]) -> Measures:
    """f1 and exact_match, each against the reference that fits best."""
    encode = engine.backbone.tokenizer.encode
    prompts = [encode(question["prompt"], verbose=False) for question in asked]
    answers = engine.answers(prompts, _MAX_NEW_TOKENS, ("\n",))
    return {
        name: {
            arm: Observed(
                [
                    max(figure(text, reference) for reference in question["references"])
                    for text, question in zip(texts, asked, strict=True)
                ]
            )
            for arm, texts in answers.items()
        }
        for name, figure in (("f1", f1), ("exact_match", exact_match))
    }
