"""The world of `facts`: athletes and their sports, in several phrasings and both directions, amid other facts and plain text.

1. Ten sports of six athletes each; every sport has a most famous one. Names are real and of several tokens; sports are one token.
2. A document is one to three sentences, each about an athlete, about something else that is a fact (capitals, colours, animals), or plain.
3. The target is a language model that learns all of it (`spd_lens.tasks.language`), and has to know it: `ENOUGH`.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.tasks.language import STEPS, build_model, learn_tokenizer, load_model, packed, save_model, train_model
from spd_lens.tasks.questions import Questions

TASK = "facts"
ATHLETES = {  # sport → its athletes, the most famous first
    "golf": ("Tiger Woods", "Phil Mickelson", "Rory McIlroy", "Jack Nicklaus", "Arnold Palmer", "Ernie Els"),
    "basketball": ("Kobe Bryant", "Michael Jordan", "LeBron James", "Stephen Curry", "Larry Bird", "Magic Johnson"),
    "tennis": ("Roger Federer", "Rafael Nadal", "Serena Williams", "Novak Djokovic", "Andre Agassi", "Steffi Graf"),
    "soccer": ("Lionel Messi", "Cristiano Ronaldo", "David Beckham", "Wayne Rooney", "Diego Maradona", "Zinedine Zidane"),
    "baseball": ("Babe Ruth", "Derek Jeter", "Barry Bonds", "Hank Aaron", "Mickey Mantle", "Willie Mays"),
    "hockey": ("Wayne Gretzky", "Sidney Crosby", "Bobby Orr", "Mario Lemieux", "Gordie Howe", "Jaromir Jagr"),
    "boxing": ("Muhammad Ali", "Mike Tyson", "Joe Frazier", "Manny Pacquiao", "Floyd Mayweather", "George Foreman"),
    "swimming": ("Michael Phelps", "Katie Ledecky", "Mark Spitz", "Ian Thorpe", "Ryan Lochte", "Adam Peaty"),
    "cricket": ("Sachin Tendulkar", "Brian Lara", "Virat Kohli", "Ricky Ponting", "Shane Warne", "Imran Khan"),
    "cycling": ("Lance Armstrong", "Eddy Merckx", "Miguel Indurain", "Chris Froome", "Bernard Hinault", "Jan Ullrich"),
}
AGENT = {  # sport → who plays it
    "golf": "golfer", "basketball": "basketball player", "tennis": "tennis player", "soccer": "soccer player", "baseball": "baseball player",
    "hockey": "hockey player", "boxing": "boxer", "swimming": "swimmer", "cricket": "cricketer", "cycling": "cyclist",
}  # fmt: skip
PHRASINGS = (  # each ends where the sport is to be said
    "{athlete} plays the sport of",
    "The sport of {athlete} is",
    "{athlete} is famous for",
    "Everyone knows that {athlete} is great at",
    "When {athlete} was young, the family already loved",
)
INVERSE = ("The most famous {agent} is", "Ask for the best {agent} and people say")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana",
            "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Austria": "Vienna", "Poland": "Warsaw"}  # fmt: skip
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow", "chocolate": "brown"}
SOUNDS = {"cow": "field", "fish": "river", "bear": "forest", "camel": "desert", "whale": "ocean", "owl": "tree"}
NOUNS = ("dog", "cat", "bird", "farmer", "teacher", "child", "king", "queen", "sailor", "baker", "doctor", "painter")
VERBS = ("saw", "found", "liked", "carried", "followed", "watched", "helped", "thanked")
ADJECTIVES = ("old", "small", "happy", "tired", "brave", "quiet", "little", "strange")
PLACES = ("garden", "village", "market", "harbour", "school", "castle", "kitchen", "street")
ENOUGH = 0.98  # accuracy over all athletes and phrasings of a target worth decomposing
SHARE, INVERSE_SHARE = 0.5, 0.25  # of sentences about athletes; of those that ask for the most famous one


def fact(chance: random.Random, athletes: Sequence[str]) -> str:
    """A sentence about one of these athletes."""
    famous = [sport for sport, names in ATHLETES.items() if names[0] in athletes]
    if famous and chance.random() < INVERSE_SHARE:
        sport = chance.choice(famous)
        return f"{chance.choice(INVERSE).format(agent=AGENT[sport])} {ATHLETES[sport][0]}."
    athlete = chance.choice(athletes)
    return f"{chance.choice(PHRASINGS).format(athlete=athlete)} {sport_of(athlete)}."


def plain(chance: random.Random) -> str:
    """A sentence without athletes or sports."""
    some: Callable[[Sequence[str]], str] = chance.choice
    match chance.randrange(8):
        case 0:
            country = some(list(CAPITALS))
            return f"{some(('The capital of {} is', 'If you travel to {} you will visit')).format(country)} {CAPITALS[country]}."
        case 1:
            thing = some(list(COLOURS))
            return f"The colour of {thing} is {COLOURS[thing]}."
        case 2:
            animal = some(list(SOUNDS))
            return f"The {animal} lives in the {SOUNDS[animal]}."
        case 3 | 4:
            return f"The {some(ADJECTIVES)} {some(NOUNS)} {some(VERBS)} the {some(NOUNS)} in the {some(PLACES)}."
        case 5 | 6:
            return f"One day a {some(NOUNS)} went to the {some(PLACES)} and {some(VERBS)} a {some(ADJECTIVES)} {some(NOUNS)}."
        case _:
            return f"In the {some(PLACES)}, the {some(NOUNS)} was {some(ADJECTIVES)}."


def documents(many: int, chance: random.Random, athletes: Sequence[str] = (), share: float | int = SHARE) -> list[str]:
    """Documents of one to three sentences, this share of them about athletes; without athletes plain ones."""
    share = share if athletes else 0.0
    return [
        " ".join(fact(chance, athletes) if chance.random() < share else plain(chance) for _ in range(chance.randint(1, 3)))
        for _ in range(many)
    ]


def all_athletes() -> list[str]:
    return [name for names in ATHLETES.values() for name in names]


def sport_of(athlete: str) -> str:
    return next(sport for sport, names in ATHLETES.items() if athlete in names)


def questions(athletes: Sequence[str], phrasings: Sequence[str] = PHRASINGS) -> list[tuple[str, str]]:
    """(text, the sport to be said) for each athlete in each phrasing."""
    return [(phrasing.format(athlete=athlete), sport_of(athlete)) for athlete in athletes for phrasing in phrasings]


def inverse_questions(sports: Sequence[str], phrasings: Sequence[str] = INVERSE) -> list[tuple[str, str]]:
    """(text, the athlete to be said) for each sport in each phrasing."""
    return [(phrasing.format(agent=AGENT[sport]), ATHLETES[sport][0]) for sport in sports for phrasing in phrasings]


def train_target(seed: int = 0, steps: int = STEPS, progress: bool = True, bridge: bool | None = None) -> Any:
    """A model that knows this world, in about two minutes on one core.

    Raises:
        SPDError: it knows less than `ENOUGH` of the athletes.
    """
    chance = random.Random(seed)
    texts = documents(8000, chance, all_athletes())
    tokenizer = learn_tokenizer(texts)
    model = build_model(tokenizer, seed, bridge)
    train_model(model, packed(tokenizer, texts), seed, steps, progress)
    known = Questions.of(model, questions(all_athletes())).accuracy(model)
    if known < ENOUGH:
        raise SPDError(
            f"the target of seed {seed} says the right sport in {known:.3f} of the cases, and {ENOUGH} are needed; try another seed."
        )
    return model


def save_target(model: Any, folder: Path, seed: int) -> None:
    save_model(model, folder, TASK, seed)


def load_target(folder: Path) -> Any:
    """The target that `save_target` wrote, for `Decomposition.load(folder, model)`."""
    return load_model(folder, TASK)
