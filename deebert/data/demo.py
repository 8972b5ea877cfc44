"""The demo task: synthetic product reviews, made from a seed, with a known difficulty.

A row asks whether a review is good or bad news for a product. Rows have three grades of difficulty,
so that one can see that easy rows leave early and hard rows leave late:

1. A cue word decides ("The kettle is wonderful.").
2. Negation and word order decide ("It looks dreadful, but the kettle is wonderful.").
3. The roles decide: the review compares two products, and the row is about one of them.

No customer wrote these texts. The module does not know tokens, files or models.
"""

from random import Random
from typing import Any

# fmt: off
PRODUCTS = (
    "kettle", "toaster", "lamp", "radio", "camera", "blender", "heater", "printer", "keyboard",
    "mixer", "drill", "scale", "speaker", "router", "charger", "projector", "scanner",
    "freezer", "vacuum", "fan",
)
GOOD = (
    "excellent", "wonderful", "superb", "reliable", "fantastic", "brilliant", "perfect",
    "delightful", "great", "solid",
)
BAD = (
    "terrible", "useless", "awful", "dreadful", "shoddy", "horrible", "worthless", "faulty",
    "poor", "miserable",
)
# fmt: on
OPENINGS = (
    "",
    "After two weeks I can say this: ",
    "In our kitchen the verdict is clear: ",
    "For the record, ",
    "A short note from a family of five: ",
    "We have had it since spring. ",
    "To answer the question below: ",
    "My brother asked, so here it is: ",
)
CLOSINGS = (
    "",
    " It came in a blue box.",
    " The cable is two metres long.",
    " We use it every morning.",
    " The manual has forty pages.",
    " Delivery took three days.",
    " Mine is the green one.",
    " That is all I have to say.",
)
# {p} is the product, {word} a cue word of the row's label, {other} one of the opposite label.
CUE = (
    "the {p} is {word}",
    "what a {word} {p} this is",
    "this {p} has been {word} from the first day",
    "I would call the {p} {word}",
    "a truly {word} {p}",
)
NEGATED = (
    "the {p} is not {other} at all",
    "nobody would call the {p} {other}",
    "I found nothing {other} about the {p}",
    "it may look {other}, but the {p} is {word}",
    "the {p} is {word}, although it looks {other}",
    "I expected a {other} {p}, and it is anything but that",
    "they say the {p} is {other}, and they are wrong",
)
# The product of the row is either {winner} or {loser}.
ROLES = (
    "the {winner} outperforms the {loser}",
    "the {loser} is outperformed by the {winner}",
    "I sent the {loser} back and kept the {winner}",
    "I kept the {winner} and sent the {loser} back",
    "next to the {winner} the {loser} feels like a toy",
    "we gave away the {loser} once we had the {winner}",
    "I would take the {winner} over the {loser} any day",
    "the {loser} was no match for the {winner}",
)
GRADE_SHARES = (0.45, 0.3, 0.25)
SPLIT_SIZES = {"train": 4000, "validation": 1000, "test": 1000}
SEED = 2020  # every run has the same rows; the seed of a run is for its training


def rows(split: str) -> list[dict[str, Any]]:
    """Make the rows of a split. No row is in two splits.

    Args:
        split: a key of `SPLIT_SIZES`.

    Returns:
        Rows with `product`, `review`, `label` (0 bad, 1 good) and `grade` (1 to 3).

    Raises:
        KeyError: the task has no such split.
    """
    size = SPLIT_SIZES[split]
    random = Random(SEED)
    seen: set[tuple[str, str]] = set()
    for name in SPLIT_SIZES:  # all splits up to this one, so that no row is in two
        made: list[dict[str, Any]] = []
        while len(made) < SPLIT_SIZES[name]:
            row = _row(random)
            if (key := (row["product"], row["review"])) not in seen:
                seen.add(key)
                made.append(row)
        if name == split:
            break
    assert len(made) == size
    return made


def _row(random: Random) -> dict[str, Any]:
    grade = random.choices((1, 2, 3), GRADE_SHARES)[0]
    label = random.randrange(2)
    product, rival = random.sample(PRODUCTS, 2)
    word, other = (random.choice(words) for words in ((BAD, GOOD), (GOOD, BAD))[label])
    sentence = random.choice((CUE, NEGATED, ROLES)[grade - 1]).format(
        p=product,
        word=word,
        other=other,
        winner=product if label else rival,
        loser=rival if label else product,
    )
    opening = random.choice(OPENINGS)
    if not opening or opening.endswith(". "):
        sentence = sentence[0].upper() + sentence[1:]
    review = f"{opening}{sentence}.{random.choice(CLOSINGS)}"
    return {"product": product, "review": review, "label": label, "grade": grade}
