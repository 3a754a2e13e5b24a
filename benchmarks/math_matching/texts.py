"""What the policy says in the game, in the template of the public ARX reasoning data, and how a text is scored.

The paper's scores (4.1): OCR of 4 (each number of the equation, its sign, all cards), mathematical reasoning of 2 (the
result, the card).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chatvla_edge.drivers.sim.tabletop import PLACES, Equation, Scene

INSTRUCTION = "Answer the question and pick the card with the correct answer."


@dataclass(frozen=True)
class Situation:
    """What there is to say. held: index of the card that was already picked, None before that."""

    equation: Equation
    numbers: tuple[int, int, int]
    place: int
    held: int | None


def situation(scene: Scene, held: int | None) -> Situation:
    """The truth about a scene."""
    first, second, third = (card.number for card in scene.cards)
    return Situation(scene.equation, (first, second, third), scene.right_place, held)


def board(equation: Equation) -> str:
    """The first two sentences."""
    return f"On the whiteboard is {equation}. {equation}={equation.answer}."


def there_are(numbers: Sequence[int]) -> str:
    """The sentence about the cards."""
    first, second, third = (f"{number} ({place})" for number, place in zip(numbers, PLACES, strict=True))
    return f"There are: {first}, {second}, and {third}."


def pick(number: int, place: int) -> str:
    """The sentence about what to do."""
    return f"I should pick {number} from {PLACES[place]}."


def reasoning(truth: Situation) -> str:
    """The whole text for a situation, without the end-of-turn token."""
    answer = truth.equation.answer
    if truth.held is not None:
        return (
            f"{board(truth.equation)} Already picked {answer} from {PLACES[truth.held]}. "
            "I should place it on the whiteboard. Next Action:"
        )
    return f"{board(truth.equation)} {there_are(truth.numbers)} {pick(answer, truth.place)} Next Action:"


_SAID = re.compile(
    r"On the whiteboard is (?P<a>\d+) (?P<op>[-+*]) (?P<b>\d+)\. \d+ [-+*] \d+=(?P<answer>\d+)\."
    r"(?: There are: (?P<n0>\d+) \(left\), (?P<n1>\d+) \(middle\), and (?P<n2>\d+) \(right\)\."
    r" I should pick (?P<pick>\d+) from (?P<place>left|middle|right)\.)?"
)


@dataclass(frozen=True)
class Score:
    """ocr 0..4, math 0..2; text: the whole text is right; place: the card it names, None if it names none."""

    ocr: int
    math: int
    text: bool
    place: int | None


def score(text: str, truth: Situation) -> Score:
    """Score a text that was said before the pick."""
    whole = text.strip() == reasoning(truth)
    said = _SAID.match(text.strip())
    if said is None:
        return Score(0, 0, whole, None)
    equation = truth.equation
    ocr = (int(said["a"]) == equation.a) + (int(said["b"]) == equation.b) + (said["op"] == equation.op)
    math = int(int(said["answer"]) == equation.answer)
    place = None
    if said["place"] is not None:
        place = PLACES.index(said["place"])
        ocr += tuple(int(said[f"n{i}"]) for i in range(3)) == truth.numbers
        math += place == truth.place
    return Score(ocr, math, whole, place)
