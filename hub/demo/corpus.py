"""Generated sentences about four worlds; a model of the first learns the others from adapters."""

from __future__ import annotations

import random
import zlib

# world -> adjectives, nouns, verbs
WORLDS = {
    "farm": (
        "old young red brown small big",
        "cow horse hen farmer dog cat",
        "sees likes feeds follows finds hears",
    ),
    "sea": (
        "deep salty stormy blue brave wooden",
        "sailor pirate whale anchor captain island",
        "boards sinks steers chases rescues plunders",
    ),
    "kitchen": (
        "crispy spicy sweet burnt fresh bitter",
        "onion pepper soup butter pastry garlic",
        "boils fries stirs chops bakes tastes",
    ),
    "space": (
        "distant silent cosmic glowing icy orbital",
        "rocket comet planet astronaut galaxy satellite",
        "orbits launches explores photographs passes attracts",
    ),
}
PLAIN, *TASKS = WORLDS
PATTERNS = ("the {a} {n} {v} the {b} {m}.", "the {n} is {a} and {b}.")
# One sentence in so many, chosen by its checksum, is held out.
ONE_IN = 8


def text(world: str, sentences: int, *, held_out: bool = False) -> str:
    """That many sentences, the same in every run; no held-out sentence is among the others."""
    draw = random.Random(f"{world} {held_out}")
    found: list[str] = []
    while len(found) < sentences:
        sentence = _sentence(world, draw)
        if (zlib.crc32(sentence.encode()) % ONE_IN == 0) == held_out:
            found.append(sentence)
    return " ".join(found)


def _sentence(world: str, draw: random.Random) -> str:
    adjectives, nouns, verbs = (words.split() for words in WORLDS[world])
    (a, b), (n, m), v = draw.sample(adjectives, 2), draw.sample(nouns, 2), draw.choice(verbs)
    return draw.choice(PATTERNS).format(a=a, b=b, n=n, m=m, v=v)


def first_noun(world: str) -> str:
    return WORLDS[world][1].split()[0]
