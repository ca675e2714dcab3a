"""Word lists and sentence frames of the toy world (data only).

A frame is a sentence with slots in braces:

==========  =====================================================================
``{c}``     the requested character, or a vague noun where the answer forgets it
``{o}``     the requested object, or a vague noun where the answer forgets it
``{a}``     an adjective, vivid or bland
``{p}``     a place
``{t}``     a time phrase
``{f}``     a feeling
``{v}``     something done to the object
``{m}``     a manner
``{w}``     a helper
``{what}``  what the answer calls itself ("a little story")
==========  =====================================================================

A poor frame is about as long as the good frame it stands in for: quality must
not be readable off the length. No frame may contain a character, an object or a
vivid adjective in plain letters, since the gold rules count these words.
"""

from __future__ import annotations

# Lists of words read better as paragraphs than one word a line.
# fmt: off


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CHARACTERS: tuple[str, ...] = _list(
    """fox owl bear rabbit hedgehog badger otter mouse crow swan wolf turtle frog goat
    squirrel beaver baker miller sailor tailor shepherd king queen princess knight wizard
    painter gardener doctor farmer fisherman teacher clockmaker blacksmith musician captain
    postman giant dragon pirate"""
)

OBJECTS: tuple[str, ...] = _list(
    """lantern kettle key map drum flute ring crown hat coat boot basket ladder bell clock
    mirror candle book brush needle kite wheel cart sword shield cup plate spoon jar bottle
    blanket pillow rope compass telescope umbrella violin hammer bucket coin"""
)

VAGUE_CHARACTERS: tuple[str, ...] = _list(
    "stranger creature fellow person visitor figure"
)
VAGUE_OBJECTS: tuple[str, ...] = _list(
    "thing item article piece product object"
)

VIVID: tuple[str, ...] = _list(
    """golden silver misty crooked velvet crimson emerald sparkling gleaming dusty mossy
    frosty windy sunny moonlit snowy amber scarlet purple rusty shiny tiny enormous gentle
    fierce sleepy cheerful mysterious ancient fragrant whispering shimmering tangled hollow
    wooden marble icy curious proud clever brave bold merry lonely humble weary"""
)
BLAND: tuple[str, ...] = _list(
    "normal plain common regular average certain standard typical general basic"
)

PLACES: tuple[str, ...] = _list(
    """harbour bridge orchard market forest river mountain village tower garden meadow cave
    castle beach lake valley mill barn chapel library kitchen cellar attic station island
    hill road fountain courtyard stable"""
)

TIMES: tuple[str, ...] = (
    "One morning", "Late one evening", "Last winter", "In early spring", "On a Sunday",
    "At midnight", "After the rain", "Before breakfast", "During the harvest", "Last summer",
    "At sunrise", "One afternoon",
)

FEELINGS: tuple[str, ...] = _list(
    "calm afraid hopeful grateful sad excited nervous content surprised puzzled"
)

ACTIONS: tuple[str, ...] = (
    "carried", "moved", "polished", "repaired", "dropped", "painted", "borrowed", "cleaned",
    "lifted", "studied", "measured", "wrapped", "traded", "buried", "guarded", "washed",
)

MANNERS: tuple[str, ...] = (
    "with great care", "in a hurry", "without a word", "all day long", "with both hands",
    "little by little", "in the dark", "again and again",
)

HELPERS: tuple[str, ...] = (
    "an aunt", "a cousin", "the neighbours", "a traveller", "two children", "the mayor",
    "an uncle", "the crowd",
)

KINDS: tuple[str, ...] = ("story", "letter", "advice", "description", "reason", "plan", "news")

REQUESTS: dict[str, tuple[str, ...]] = {
    "story": (
        "Tell me a story about a {c} and a {o}.",
        "Write a short tale of a {c} who found a {o}.",
        "I would like a story with a {c} and a {o} in it.",
        "Please make up a bedtime tale about the {c} and the {o}.",
    ),
    "letter": (
        "Write a letter from a {c} about a {o}.",
        "Please write a note from the {c} to a friend about the {o}.",
        "What would a {c} say in a letter about a {o}?",
        "I need a letter in which a {c} talks about a {o}.",
    ),
    "advice": (
        "Give advice to a {c} who lost a {o}.",
        "What should the {c} do after losing the {o}?",
        "Please help a {c} who cannot find a {o}.",
        "A {c} has lost a {o}. What would you say?",
    ),
    "description": (
        "Describe a {c} holding a {o}.",
        "Describe the {o} that belongs to the {c}.",
        "What does the {o} of the {c} look like?",
        "Please describe how a {c} and a {o} look together.",
    ),
    "reason": (
        "Explain why a {c} needs a {o}.",
        "Why would the {c} keep a {o}?",
        "Tell me the reason a {c} wants a {o}.",
        "Please explain what a {o} means to a {c}.",
    ),
    "plan": (
        "Make a plan for a {c} who wants to repair a {o}.",
        "How can the {c} repair a {o}?",
        "Plan a day for a {c} with a {o}.",
        "What should the {c} do with the {o} today?",
    ),
    "news": (
        "Report the news about a {c} and a {o}.",
        "Write a news report on the {c} who sold a {o}.",
        "What happened to the {c} with the {o}?",
        "Please tell me the latest about the {c} and the {o}.",
    ),
}

WHAT: dict[str, tuple[str, ...]] = {
    "story": ("a little story", "a short tale"),
    "letter": ("a short letter", "a little note"),
    "advice": ("a bit of advice", "a few words"),
    "description": ("a short picture", "a few lines"),
    "reason": ("a short answer", "the main reason"),
    "plan": ("a little plan", "a few steps"),
    "news": ("a short report", "the latest news"),
}

# The phrases by which the gold rules know a kind opening and a proper ending.
COURTESY_MARKS: tuple[str, ...] = (
    "pleasure", "thank you", "happy to", "gladly", "lovely", "welcome", "a joy", "delighted",
)
ENDING_MARKS: tuple[str, ...] = (
    "in the end", "so remember", "and that is why", "from that day on", "the lesson is",
    "let this remind",
)

KIND_OPENINGS: tuple[str, ...] = (
    "With pleasure, my friend, here is {what}.",
    "Thank you for asking, here is {what}.",
    "I am happy to give you {what}.",
    "Gladly, I hope you like {what}.",
    "What a lovely question, here is {what}.",
    "You are most welcome, here is {what}.",
    "It is a joy to write {what}.",
    "I am delighted to share {what}.",
)
CURT_OPENINGS: tuple[str, ...] = (
    "Fine, if you must, here is {what}.",
    "Well, I suppose this is {what}.",
    "Not you again, but here is {what}.",
    "Whatever, take this or leave {what}.",
    "I have no time for {what}.",
    "Do not ask me more than {what}.",
    "Right, so that makes {what}.",
    "Hurry up, I only have {what}.",
)

INTROS: dict[str, tuple[str, ...]] = {
    "story": (
        "Once a {a} {c} lived near the {a} {p}.",
        "{t} a {a} {c} walked to the {a} {p}.",
        "There was a {a} {c} in the {a} {p}.",
    ),
    "letter": (
        "I am the {a} {c} from the {a} {p}.",
        "This is the {a} {c}, writing from a {a} {p}.",
        "Your {a} {c} sends word from the {a} {p}.",
    ),
    "advice": (
        "A {a} {c} should first search the {a} {p}.",
        "Every {a} {c} loses things near a {a} {p}.",
        "Let the {a} {c} walk back to the {a} {p}.",
    ),
    "description": (
        "Picture a {a} {c} standing beside the {a} {p}.",
        "The {a} {c} stands at the door of a {a} {p}.",
        "You can see a {a} {c} in the {a} {p}.",
    ),
    "reason": (
        "A {a} {c} works alone at the {a} {p}.",
        "Think of the {a} {c} who lives by a {a} {p}.",
        "The {a} {c} has to cross the {a} {p}.",
    ),
    "plan": (
        "First the {a} {c} should go to the {a} {p}.",
        "{t} the {a} {c} must leave the {a} {p}.",
        "To begin, a {a} {c} needs a {a} {p}.",
    ),
    "news": (
        "{t} a {a} {c} was seen near the {a} {p}.",
        "People at the {a} {p} met a {a} {c}.",
        "A {a} {c} came to the {a} {p} at last.",
    ),
}

MIDDLES: dict[str, tuple[str, ...]] = {
    "story": (
        "{t} the {c} found a {a} {o} and felt {f}.",
        "There the {c} {v} a {a} {o} {m}.",
        "A {a} {o} made the {c} feel {f}.",
    ),
    "letter": (
        "{t} this {c} {v} a {a} {o} {m}.",
        "My {a} {o} makes an old {c} feel {f}.",
        "I must tell you about the {a} {o} a {c} {v}.",
    ),
    "advice": (
        "The {a} {o} may be where the {c} {v} it.",
        "If the {c} feels {f}, the {a} {o} can wait.",
        "A {c} who looks {m} will find the {a} {o}.",
    ),
    "description": (
        "In front of the {c} lies a {a} {o}.",
        "The {c} holds the {a} {o} {m} and looks {f}.",
        "The {a} {o} was {v} by the {c} {m}.",
    ),
    "reason": (
        "Without the {a} {o} the {c} would be {f}.",
        "{t} the {c} {v} a {a} {o} {m}.",
        "The {a} {o} keeps the {c} from feeling {f}.",
    ),
    "plan": (
        "Then the {c} can take the {a} {o} {m}.",
        "Next the {a} {o} must be {v} by the {c}.",
        "A {c} who is {f} should rest the {a} {o}.",
    ),
    "news": (
        "The {c} {v} a {a} {o} {m}, they say.",
        "A {a} {o} was {v} by the {c} {m}.",
        "Later the {c} showed the {a} {o} and looked {f}.",
    ),
}

EXTRAS: tuple[str, ...] = (
    "{t} the {o} was {v} by {w} near the {a} {p}.",
    "Far away, {w} looked {f} and {v} the {o} {m}.",
    "The {c} asked {w} for help at the {a} {p}.",
    "Under the {a} {p} the {o} shook and {w} felt {f}.",
    "{t} the {c} and {w} crossed the {a} {p} together.",
    "From the {a} {p} came {w}, who asked about the {o}.",
    "Soon the {c} felt {f} and slept in a {a} {p}.",
    "Nobody in the {a} {p} had seen such a {a} {o}.",
)

GOOD_ENDINGS: tuple[str, ...] = (
    "In the end, {lesson}.",
    "So remember, {lesson}.",
    "And that is why {lesson}.",
    "From that day on, {lesson}.",
    "The lesson is that {lesson}.",
    "Let this remind us that {lesson}.",
)
VIRTUES: tuple[str, ...] = (
    "patience", "kindness", "courage", "honesty", "friendship", "hope", "care", "trust",
    "laughter", "hard work",
)
LESSONS: tuple[str, ...] = (
    "is worth more than riches", "opens every door", "never goes to waste",
    "lights the longest night", "makes every way shorter", "always comes home",
    "is the best of gifts", "grows when it is shared",
)
POOR_ENDINGS: tuple[str, ...] = (
    "Then {bland}.",
    "After that, {bland}.",
    "Later on, {bland}.",
    "Anyway, as things go, {bland}.",
    "Well, as far as I know, {bland}.",
    "At some point or other, {bland}.",
)
BLAND_EVENTS: tuple[str, ...] = (
    "the day went on", "nobody said much more", "other things came up",
    "there was not much to add", "it was the same as before", "some more time went by",
    "that was more or less it", "people did what they do",
)

REVIEWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "character": (
        ("It names the {c}.", "We meet the {c}.", "The {c} is there."),
        ("It forgets the {c}.", "We never meet the {c}.", "The {c} is missing."),
    ),
    "object": (
        ("It names the {o}.", "We see the {o}.", "The {o} is there."),
        ("It forgets the {o}.", "We never see the {o}.", "The {o} is missing."),
    ),
    "courtesy": (
        ("It is kind.", "It opens with good manners.", "It begins warmly."),
        ("It is rude.", "It opens with bad manners.", "It begins coldly."),
    ),
    "vivid": (
        ("It is colourful.", "The words are vivid.", "It is full of detail."),
        ("It is dull.", "The words are flat.", "It is short of detail."),
    ),
    "ending": (
        ("It has an ending.", "It closes well.", "It finishes with a lesson."),
        ("It has no ending.", "It closes badly.", "It finishes without a lesson."),
    ),
}
FLAW_REVIEWS: dict[str, tuple[str, ...]] = {
    "wrong": ("It speaks of the {x} instead.", "The {x} has no place in it."),
    "repeat": ("It repeats itself.", "It says the same line twice."),
    "unfinished": ("It stops too early.", "It is cut off."),
}
# From no good slot to all five.
VERDICTS: tuple[str, ...] = ("terrible", "poor", "weak", "fair", "good", "excellent")

FACTS: tuple[str, ...] = (
    "The {c} lives near the {p}.",
    "A {c} often feels {f}.",
    "A {a} {o} was {v} {m}.",
    "You can buy a {o} at the {p}.",
    "The {p} is {a} and the {o} is {a}.",
    "The {c} likes the {a} {p}.",
    "Few know why the {c} {v} the {o}.",
    "{t} the {c} is {f}.",
)
