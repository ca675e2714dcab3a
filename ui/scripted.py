"""Somebody who ranks and compares by a formula, through the handlers of the app's own tabs."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from lora_rlhf.data.records import prompt_text
from lora_rlhf.preferences.judges import Judge, noise_for_agreement
from lora_rlhf.runs import Json
from ui.asking import Ask, Waiting, finished
from ui.chatting import Controls
from ui.comparing import POOL, Vote, ask_both, vote
from ui.people import Person
from ui.ranking import Sheet, next_sheet, plan_of, submit
from ui.studio import Studio

WORDS_A_MINUTE = 238  # of silent reading; Brysbaert 2019
PILOT = 32  # prompts that tell how far apart utilities lie
Tell = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass
class Labeler:
    """Somebody who prefers what a judge prefers, with noise.

    Attributes:
        studio: the app.
        person: under whose name the votes are stored.
        judge: utility of (prompt, answer).
        noise: spread of the Gumbel noise on each utility; 0: none.
        chance: of the noise.
    """

    studio: Studio
    person: Person
    judge: Judge
    noise: float = 0.0
    chance: random.Random = field(default_factory=random.Random)

    def utility(self, prompt: str, answer: str) -> float:
        """What this answer is worth to them now."""
        found = self.judge(prompt, answer)
        if self.noise:
            # -log of a standard exponential is a standard Gumbel.
            found -= self.noise * math.log(self.chance.expovariate(1.0))
        return found

    def rank(self, adapter: str, answers: int, count: int, tell: Tell) -> None:
        """Rank answers of an adapter until so many of this person's rankings are stored."""
        facts = self.studio.engine.facts()
        plan = plan_of(
            self.studio,
            self.person,
            [adapter],
            answers,
            facts.temperature,
            1.0,
            facts.default_new_tokens,
        )
        done = len(self.studio.judged_by(self.person.name, "rank"))
        sheet = Sheet()
        while done < count:
            tell("ranking", done, count)
            sheet = _last(next_sheet(self.studio, self.person, plan, sheet))
            sheet = submit(self.studio, self.person, sheet, self._ranking(sheet))
            done += 1
        tell("ranking", done, count)

    def _ranking(self, sheet: Sheet) -> Json:
        """What the page would send: letters best first, those of one utility together."""
        worth: dict[float, list[str]] = {}
        for answer in sheet.answers:
            utility = self.utility(sheet.prompt, answer["text"])
            worth.setdefault(utility, []).append(answer["letter"])
        texts = [sheet.prompt, *(a["text"] for a in sheet.answers)]
        return {
            "outcome": "decided",
            "order": [worth[utility] for utility in sorted(worth, reverse=True)],
            "ms": reading_ms(texts),
            "keys": len(sheet.answers) + 1,
            "device": "desktop",
        }

    def compare(self, new: str, old: str, count: int, label: str, tell: Tell) -> None:
        """Vote on blind pairs on held-out prompts until so many of this person's are stored.

        Args:
            new: an adapter.
            old: another one.
            count: votes.
            label: what to call this.
            tell: hears of the progress.
        """
        facts = self.studio.engine.facts()
        first, second = (
            Controls(adapter, facts.temperature, 1.0, facts.default_new_tokens, None)
            for adapter in (new, old)
        )
        done = len(self.studio.judged_by(self.person.name, "pair"))
        while done < count:
            tell(label, done, count)
            asked = ask_both(self.studio, self.person, "labeler", "", POOL, True, (first, second))
            pane = _last(asked)
            a, b = (self.utility(pane.prompt, text) for text in pane.texts)
            said: Vote = "tie" if a == b else "a" if a > b else "b"
            client = {"ms": reading_ms([pane.prompt, *pane.texts]), "keys": 1, "device": "desktop"}
            vote(self.studio, self.person, pane, said, client)
            done += 1
        tell(label, done, count)


def reading_ms(texts: list[str]) -> int:
    """How long reading takes."""
    return round(sum(len(text.split()) for text in texts) / WORDS_A_MINUTE * 60_000)


def measured_noise(
    studio: Studio, judge: Judge, adapter: str, answers: int, agreement: float, tell: Tell
) -> float:
    """The spread of noise at which a labeler of these answers agrees so often with the judge."""
    facts = studio.engine.facts()
    utilities = []
    prompts = studio.engine.pool("train")[:PILOT]
    for number, prompt in enumerate(prompts):
        tell("measuring the noise", number + 1, len(prompts))
        asks = [
            Ask(adapter, prompt.messages, facts.temperature, 1.0, facts.default_new_tokens, seed)
            for seed in range(number * answers, (number + 1) * answers)
        ]
        rows = []
        for item in studio.answers("pilot", "labeler", asks):
            if not isinstance(item, Waiting):
                rows = item
        if finished(rows):
            text = prompt_text(prompt.messages)
            utilities.append([judge(text, row.text) for row in rows])
    return noise_for_agreement(utilities, agreement)


def _last(items: Iterable[T]) -> T:
    """What a handler shows in the end."""
    *_, last = items
    return last
