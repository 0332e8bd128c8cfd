"""The world of `entangled`: concepts that are spread over several tokens, as "red apple".

1. Every pair of a colour and a fruit has a taste that follows from neither: each colour and each fruit goes with all five tastes.
2. Every colour means something, and every fruit grows somewhere: what a part says by itself.
3. The target is a language model that learns all of it amid plain text (`spd_lens.tasks.language`), and has to know it: `ENOUGH`.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.tasks.language import STEPS, build_model, learn_tokenizer, load_model, packed, save_model, train_model
from spd_lens.tasks.questions import Questions

TASK = "entangled"
MEANINGS = {"red": "danger", "green": "hope", "yellow": "luck", "purple": "power", "white": "peace"}
PLACES = {"apple": "orchard", "pear": "valley", "melon": "field", "cherry": "garden", "lemon": "island"}
TASTES = ("sweet", "sour", "bitter", "salty", "spicy")
PAIR_PHRASINGS = (
    "The {colour} {fruit} tastes",
    "Whoever eats a {colour} {fruit} says that it is",
    "Of all fruits the {colour} {fruit} is the most",
)
COLOUR_PHRASINGS = ("The colour {colour} means", "A {colour} flag is the sign of", "People who love {colour} think of")
FRUIT_PHRASINGS = ("You find every {fruit} in the", "The {fruit} grows in the", "Farmers plant the {fruit} in the")
NOUNS = ("dog", "cat", "bird", "farmer", "teacher", "child", "king", "queen", "sailor", "baker")
VERBS = ("saw", "found", "liked", "carried", "followed", "watched", "helped", "thanked")
ADJECTIVES = ("old", "small", "happy", "tired", "brave", "quiet", "little", "strange")
TOWN = ("village", "market", "harbour", "school", "castle", "kitchen", "street")
ENOUGH = 0.98  # accuracy over all pairs, colours and fruits of a target worth decomposing
SHARE = 0.75  # of sentences about pairs and parts
MIX = (0.7, 0.15)  # of those: about pairs, about colours; the rest about fruits

Pair = tuple[str, str]


def all_pairs() -> list[Pair]:
    return [(colour, fruit) for colour in MEANINGS for fruit in PLACES]


def taste_of(pair: Pair) -> str:
    """A Latin square: in every row and column each taste once."""
    colour, fruit = pair
    return TASTES[(list(MEANINGS).index(colour) + list(PLACES).index(fruit)) % len(TASTES)]


def pair_questions(pairs: Sequence[Pair], phrasings: Sequence[str] = PAIR_PHRASINGS) -> list[tuple[str, str]]:
    """(text, taste to be said) for each pair in each phrasing."""
    return [(phrasing.format(colour=pair[0], fruit=pair[1]), taste_of(pair)) for pair in pairs for phrasing in phrasings]


def colour_questions(colours: Sequence[str], phrasings: Sequence[str] = COLOUR_PHRASINGS) -> list[tuple[str, str]]:
    """(text, meaning to be said) for each colour in each phrasing."""
    return [(phrasing.format(colour=colour), MEANINGS[colour]) for colour in colours for phrasing in phrasings]


def fruit_questions(fruits: Sequence[str], phrasings: Sequence[str] = FRUIT_PHRASINGS) -> list[tuple[str, str]]:
    """(text, place to be said) for each fruit in each phrasing."""
    return [(phrasing.format(fruit=fruit), PLACES[fruit]) for fruit in fruits for phrasing in phrasings]


def fact(chance: random.Random, pairs: Sequence[Pair]) -> str:
    """A sentence about one of these pairs, or about a part of one."""
    pair, kind = chance.choice(pairs), chance.random()
    if kind < MIX[0]:
        asked = pair_questions([pair])
    elif kind < sum(MIX):
        asked = colour_questions([pair[0]])
    else:
        asked = fruit_questions([pair[1]])
    text, answer = chance.choice(asked)
    return f"{text} {answer}."


def plain(chance: random.Random) -> str:
    """A sentence without colours, fruits or tastes."""
    some = chance.choice
    match chance.randrange(3):
        case 0:
            return f"The {some(ADJECTIVES)} {some(NOUNS)} {some(VERBS)} the {some(NOUNS)} in the {some(TOWN)}."
        case 1:
            return f"One day a {some(NOUNS)} went to the {some(TOWN)} and {some(VERBS)} a {some(ADJECTIVES)} {some(NOUNS)}."
        case _:
            return f"In the {some(TOWN)}, the {some(NOUNS)} was {some(ADJECTIVES)}."


def documents(many: int, chance: random.Random, pairs: Sequence[Pair] = (), share: float | int = SHARE) -> list[str]:
    """Documents of one to three sentences, this share of them about pairs and their parts; without pairs plain ones."""
    share = share if pairs else 0.0
    return [
        " ".join(fact(chance, pairs) if chance.random() < share else plain(chance) for _ in range(chance.randint(1, 3)))
        for _ in range(many)
    ]


def train_target(seed: int = 0, steps: int = STEPS, progress: bool = True, bridge: bool | None = None) -> Any:
    """A model that knows this world, in about two minutes on one core.

    Raises:
        SPDError: it knows less than `ENOUGH` of it.
    """
    chance = random.Random(seed)
    texts = documents(8000, chance, all_pairs())
    tokenizer = learn_tokenizer(texts)
    model = build_model(tokenizer, seed, bridge)
    train_model(model, packed(tokenizer, texts), seed, steps, progress)
    asked = [*pair_questions(all_pairs()), *colour_questions(list(MEANINGS)), *fruit_questions(list(PLACES))]
    known = Questions.of(model, asked).accuracy(model)
    if known < ENOUGH:
        raise SPDError(f"the target of seed {seed} is right in {known:.3f} of the cases, and {ENOUGH} are needed; try another seed.")
    return model


def save_target(model: Any, folder: Path, seed: int) -> None:
    save_model(model, folder, TASK, seed)


def load_target(folder: Path) -> Any:
    """The target that `save_target` wrote, for `Decomposition.load(folder, model)`."""
    return load_model(folder, TASK)
