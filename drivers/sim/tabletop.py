"""The math-matching game of the ChatVLA-2 paper (4.1) on a simulated table, seen by one camera straight above it.

On a whiteboard stands an equation in handwriting, `A op B =`; before it lie three cards with printed numbers, one of
which is the answer. Two arms with grippers can pick a card (a gripper that closes on it holds it) and place it on the
board behind the equals sign (a gripper that opens lays down what it holds).

Everything follows from a seed. There is no clock: `step` is told how much time passes, so the same world runs in real
time and in virtual time.

Units: metres, radians, seconds; x to the right, y up the table towards the board. A command and a state have 14
numbers: six joints (rad) and the gripper's opening (m) of the left arm, then of the right arm.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers.sim.digits import handwritten, printed
from chatvla_edge.drivers.sim.drawing import Canvas
from chatvla_edge.drivers.sim.planar_arm import JOINTS, PlanarArm

Array = NDArray[np.float64]
Frame = NDArray[np.uint8]

Split = Literal["in_domain", "held_out_writers", "held_out"]
"""in_domain: equations and handwriting of the training data; held_out_writers: its equations in others' handwriting;
held_out: equations that no robot data show, in others' handwriting."""
SPLITS: tuple[Split, ...] = get_args(Split)

VIEW = (-0.4, 0.4, -0.3, 0.3)  # left, right, bottom, top of what the camera sees
PLACES = ("left", "middle", "right")
ARMS = (PlanarArm((-0.15, -0.5), -1), PlanarArm((0.15, -0.5), 1))
HOME = ((-0.25, -0.18), (0.25, -0.18))
BOARD = (0.0, 0.19, 0.68, 0.18)  # centre and size
SLOT = (0.22, 0.19)  # where the answer belongs, behind the equals sign
CARD = (0.13, 0.115)
CARDS = ((-0.25, -0.03), (0.05, -0.03), (0.27, -0.03))  # where cards lie, give or take the jitter
CARD_JITTER = (0.025, 0.03)
OPEN, CLOSED = 0.088, 0.006  # the gripper's opening
HOLDS, LETS_GO = 0.03, 0.05  # below and above which a gripper takes and releases a card
REACH = 0.04  # a gripper takes the card whose centre is this near
JOINT_SPEED, GRIPPER_SPEED = 4.0, 0.4
ACTIONS = 2 * (JOINTS + 1)


@dataclass(frozen=True)
class Equation:
    """`a op b`, op one of + - *."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        """What stands on the right card."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b}"


def equations(highest: int) -> tuple[Equation, ...]:
    """Every equation of two digits whose answer lies in 0..highest."""
    every = (Equation(a, op, b) for op in "+-*" for a in range(10) for b in range(10))
    return tuple(equation for equation in every if 0 <= equation.answer <= highest)


def split_equations(highest: int, held_out: bool) -> tuple[Equation, ...]:
    """Equations of the robot data, or the fifth of all that is held out from it; the same for ever."""
    every = equations(highest)
    order = np.random.default_rng(2507).permutation(len(every))
    cut = len(every) // 5
    return tuple(every[index] for index in sorted(order[:cut] if held_out else order[cut:]))


@dataclass
class Card:
    """One card: its number, where its centre is, how it is turned."""

    number: int
    x: float
    y: float
    angle: float


@dataclass
class Scene:
    """What lies on the table, and how it looks: everything but the arms."""

    equation: Equation
    cards: list[Card]
    glyphs: list[tuple[NDArray[np.float32], float, float, float, float, float, float]]
    strokes: list[tuple[tuple[float, float], tuple[float, float], float]]
    board: tuple[float, float, float]  # x, y, angle
    colours: dict[str, tuple[float, float, float]]
    light: float
    gradient: tuple[float, float]
    noise: float

    @property
    def right_place(self) -> int:
        """Index of the card with the answer."""
        return next(i for i, card in enumerate(self.cards) if card.number == self.equation.answer)


def draw_scene(rng: np.random.Generator, split: Split, highest: int) -> Scene:
    """A random scene of a split."""
    pool = split_equations(highest, held_out=split == "held_out")
    # First the sign, then the equation: there are fewer of some kinds, and each should be seen as often.
    op = str(rng.choice(sorted({equation.op for equation in pool})))
    alike = [equation for equation in pool if equation.op == op]
    equation = alike[rng.integers(len(alike))]
    board = (BOARD[0] + rng.uniform(-0.012, 0.012), BOARD[1] + rng.uniform(-0.01, 0.01), rng.uniform(-0.02, 0.02))
    at = [board[0] + x + rng.uniform(-0.012, 0.012) for x in (-0.265, -0.165, -0.065, 0.035)]
    rise = [board[1] + rng.uniform(-0.012, 0.012) for _ in range(4)]
    glyphs = []
    for digit, x, y in ((equation.a, at[0], rise[0]), (equation.b, at[2], rise[2])):
        images = handwritten(digit, held_out=split != "in_domain")
        size = rng.uniform(0.085, 0.105)
        glyphs.append(
            (
                images[rng.integers(len(images))] ** np.float32(rng.uniform(0.6, 1.2)),
                x,
                y,
                size * rng.uniform(0.85, 1.1),
                size,
                rng.uniform(-0.2, 0.2),
                rng.uniform(-0.2, 0.2),
            )
        )
    strokes = [*_sign(rng, op, at[1], rise[1]), *_sign(rng, "=", at[3], rise[3])]
    cards = [
        Card(
            number,
            x + rng.uniform(-CARD_JITTER[0], CARD_JITTER[0]),
            y + rng.uniform(-CARD_JITTER[1], CARD_JITTER[1]),
            rng.uniform(-0.12, 0.12),
        )
        for number, (x, y) in zip(_numbers(rng, equation, highest), CARDS, strict=True)
    ]

    def tint(colour: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
        r, g, b = np.asarray(colour) + rng.normal(0, spread, 3)
        return float(r), float(g), float(b)

    return Scene(
        equation,
        cards,
        glyphs,
        strokes,
        board,
        colours={
            "table": tint((133, 106, 78), 12),
            "board": tint((236, 238, 234), 5),
            "frame": tint((90, 92, 96), 8),
            "ink": tint((32, 44, 110), 14),
            "card": tint((250, 248, 240), 4),
            "edge": tint((70, 70, 70), 8),
            "print": tint((150, 24, 24), 12),
            "link": tint((58, 60, 66), 6),
            "hand": tint((205, 208, 214), 6),
        },
        light=rng.uniform(0.85, 1.1),
        gradient=(rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)),
        noise=rng.uniform(2, 5),
    )


def _numbers(rng: np.random.Generator, equation: Equation, highest: int) -> list[int]:
    """The answer among two others: results of the other operations, near misses, anything."""
    a, b, answer = equation.a, equation.b, equation.answer
    tempting = {a + b, abs(a - b), a * b, answer + 1, answer - 1, answer + 2, answer - 3}
    likely = sorted(number for number in tempting - {answer} if 0 <= number <= highest)
    others: list[int] = []
    while len(others) < 2:
        number = int(rng.choice(likely)) if rng.random() < 0.5 and likely else int(rng.integers(highest + 1))
        if number not in (answer, *others):
            others.append(number)
    numbers = [answer, *others]
    rng.shuffle(numbers)
    return numbers


def _sign(
    rng: np.random.Generator, sign: str, x: float, y: float
) -> list[tuple[tuple[float, float], tuple[float, float], float]]:
    """Pen strokes of a sign around (x, y)."""
    reach, width = rng.uniform(0.02, 0.026), rng.uniform(0.008, 0.012)

    def end(dx: float, dy: float) -> tuple[float, float]:
        return x + dx * reach + rng.normal(0, 0.0025), y + dy * reach + rng.normal(0, 0.0025)

    lines: dict[str, list[tuple[float, float, float, float]]] = {
        "+": [(-1, 0, 1, 0), (0, -1, 0, 1)],
        "-": [(-1, 0, 1, 0)],
        "*": [(-0.8, -0.8, 0.8, 0.8), (-0.8, 0.8, 0.8, -0.8)],
        "=": [(-1, 0.4, 1, 0.4), (-1, -0.4, 1, -0.4)],
    }
    return [(end(a, b), end(c, d), width) for a, b, c, d in lines[sign]]


def home_state() -> Array:
    """Both arms at home, grippers open, [14]."""
    parts = [np.append(arm.joints(*place), OPEN) for arm, place in zip(ARMS, HOME, strict=True)]
    return np.concatenate(parts)


@dataclass
class Tabletop:
    """The world. `highest`: the largest number on a card.

    picks: what each closing gripper took, as (time, card's index); placed: the card whose centre lies on the board.
    """

    highest: int = 9
    scene: Scene = field(init=False)
    time: float = field(init=False)
    picks: list[tuple[float, int]] = field(init=False)
    placed: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.reset(0)

    def reset(self, seed: int, split: Split = "in_domain", start_noise: float = 0.02) -> None:
        """A new scene; the arms stand at home, give or take `start_noise` rad."""
        rng = np.random.default_rng([seed, SPLITS.index(split), 41])
        self.scene = draw_scene(rng, split, self.highest)
        self._noise = np.random.default_rng([seed, 42])
        self._backgrounds: dict[tuple[int, int, int], NDArray[np.float32]] = {}
        self._changed = 0
        self.time, self.picks, self.placed = 0.0, [], None
        self._held: list[int | None] = [None, None]
        state = home_state()
        for first in (0, 7):
            state[first : first + JOINTS] += rng.normal(0, start_noise, JOINTS)
        self._state = state

    # ---------------------------------------------------------------------------------------------------- the arms

    @property
    def state(self) -> NDArray[np.float32]:
        """Measured joints and openings, [14]."""
        return self._state.astype(np.float32)

    @property
    def held(self) -> tuple[int | None, int | None]:
        """Index of the card in the left and in the right gripper."""
        return self._held[0], self._held[1]

    def put(self, state: Array, held: tuple[int | None, int | None] = (None, None)) -> None:
        """Set the arms down in a state, holding cards: where demonstrations start."""
        self._state = np.array(state, np.float64)
        self._held = list(held)
        self._changed += 1
        self._carry()

    def hands(self) -> Array:
        """Where both hands are, [2, 2] m."""
        return np.stack([arm.hand(self._state[7 * i : 7 * i + JOINTS]) for i, arm in enumerate(ARMS)])

    def step(self, command: NDArray[np.floating], dt: float) -> None:
        """Let `dt` seconds pass while the arms head for `command` [14] at no more than their speed.

        Raises ValueError for a command that is not 14 finite numbers.
        """
        command = np.asarray(command, np.float64)
        if command.shape != (ACTIONS,) or not np.isfinite(command).all():
            raise ValueError(f"a command is {ACTIONS} finite numbers, found {command}")
        self.time += dt
        bound = np.full(ACTIONS, JOINT_SPEED * dt)
        bound[[6, 13]] = GRIPPER_SPEED * dt
        before = self._state[[6, 13]]
        self._state = self._state + np.clip(command - self._state, -bound, bound)
        self._state[[6, 13]] = np.clip(self._state[[6, 13]], 0.0, OPEN)
        for arm in range(2):
            self._grip(arm, float(before[arm]), float(self._state[7 * arm + 6]))
        self._carry()

    def _grip(self, arm: int, before: float, now: float) -> None:
        if before >= HOLDS > now and self._held[arm] is None:
            hand = self.hands()[arm]
            free = [i for i in range(len(self.scene.cards)) if i not in self._held]
            if free:
                distance, nearest = min((float(np.hypot(*(self._centre(i) - hand))), i) for i in free)
                if distance <= REACH:
                    self._held[arm] = nearest
                    self.picks.append((self.time, nearest))
                    self._changed += 1
        held = self._held[arm]
        if now > LETS_GO and held is not None:
            self._held[arm] = None
            self._changed += 1
            x, y, _ = self.scene.board
            if (np.abs(self._centre(held) - (x, y)) <= (BOARD[2] / 2, BOARD[3] / 2)).all():
                self.placed = held

    def _carry(self) -> None:
        for hand, held in zip(self.hands(), self._held, strict=True):
            if held is not None:
                self.scene.cards[held].x, self.scene.cards[held].y = float(hand[0]), float(hand[1])

    def _centre(self, card: int) -> Array:
        return np.array([self.scene.cards[card].x, self.scene.cards[card].y])

    @property
    def slot(self) -> Array:
        """Where the answer belongs, [2] m."""
        x, y, _ = self.scene.board
        return np.array([x - BOARD[0] + SLOT[0], y - BOARD[1] + SLOT[1]])

    # -------------------------------------------------------------------------------------------------- the picture

    def render(self, height: int = 480, width: int = 640) -> Frame:
        """What the camera sees now, [height, width, 3] RGB. Each call has its own sensor noise."""
        key = (height, width, self._changed)
        if key not in self._backgrounds:
            self._backgrounds = {key: self._background(height, width)}
        pixels = self._backgrounds[key].copy()
        canvas = Canvas(pixels, *VIEW)
        self._draw_arms(canvas)
        for held in self._held:
            if held is not None:
                self._draw_card(canvas, self.scene.cards[held], lifted=True)
        pixels *= self._light(height, width)
        return self._sense(pixels)

    def _background(self, height: int, width: int) -> NDArray[np.float32]:
        scene = self.scene
        pixels = np.empty((height, width, 3), np.float32)
        pixels[:] = scene.colours["table"]
        canvas = Canvas(pixels, *VIEW)
        x, y, angle = scene.board
        canvas.rectangle(x, y, BOARD[2] + 0.02, BOARD[3] + 0.02, angle, scene.colours["frame"])
        canvas.rectangle(x, y, BOARD[2], BOARD[3], angle, scene.colours["board"])
        for glyph in scene.glyphs:
            canvas.stamp(*glyph, scene.colours["ink"])
        for a, b, pen in scene.strokes:
            canvas.stroke(a, b, pen, scene.colours["ink"])
        for index, card in enumerate(scene.cards):
            if index not in self._held:
                self._draw_card(canvas, card, lifted=False)
        return pixels

    def _draw_card(self, canvas: Canvas, card: Card, lifted: bool) -> None:
        """A lifted card is nearer to the camera: larger, and with a shadow."""
        colours, grow = self.scene.colours, 1.15 if lifted else 1.0
        w, h = CARD[0] * grow, CARD[1] * grow
        if lifted:
            canvas.rectangle(card.x + 0.014, card.y - 0.016, w, h, card.angle, (40.0, 34.0, 28.0))
        canvas.rectangle(card.x, card.y, w + 0.006, h + 0.006, card.angle, colours["edge"])
        canvas.rectangle(card.x, card.y, w, h, card.angle, colours["card"])
        mask = printed(card.number)
        size = 0.075 * grow
        wide = size * mask.shape[1] / mask.shape[0]
        canvas.stamp(mask, card.x, card.y, wide, size, card.angle, 0.0, colours["print"])

    def _draw_arms(self, canvas: Canvas) -> None:
        colours = self.scene.colours
        for index, arm in enumerate(ARMS):
            q, opening = self._state[7 * index : 7 * index + JOINTS], float(self._state[7 * index + 6])
            base, elbow, hand = (tuple(map(float, point)) for point in arm.points(q))
            heading = arm.heading(q)
            forward = np.array([-np.sin(heading), np.cos(heading)])
            beside = np.array([forward[1], -forward[0]])
            wrist = np.asarray(hand) - 0.075 * forward
            canvas.stroke((base[0], base[1]), (elbow[0], elbow[1]), 0.04, colours["link"])
            canvas.stroke((elbow[0], elbow[1]), (float(wrist[0]), float(wrist[1])), 0.03, colours["link"])
            gap = 0.012 + opening / 2
            palm = np.asarray(hand) - 0.06 * forward
            canvas.rectangle(float(palm[0]), float(palm[1]), 0.13, 0.022, heading, colours["hand"])
            for sign in (-1, 1):
                finger = np.asarray(hand) - 0.025 * forward + sign * gap * beside
                canvas.rectangle(float(finger[0]), float(finger[1]), 0.014, 0.075, heading, colours["hand"])

    def _light(self, height: int, width: int) -> NDArray[np.float32]:
        across, down = self.scene.gradient
        columns = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(across)
        rows = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(down)
        light: NDArray[np.float32] = np.float32(self.scene.light) + rows[:, None, None] + columns[None, :, None]
        return light

    def _sense(self, pixels: NDArray[np.float32]) -> Frame:
        """Sensor noise and rounding."""
        grain = _grain()
        start = int(self._noise.integers(grain.size - pixels.size + 1))
        # + 0.5: the conversion truncates.
        pixels += grain[start : start + pixels.size].reshape(pixels.shape) * np.float32(self.scene.noise) + np.float32(
            0.5
        )
        np.clip(pixels, 0, 255, out=pixels)
        return pixels.astype(np.uint8)


@cache
def _grain() -> NDArray[np.float32]:
    """Standard normal numbers of which each picture takes a stretch: as random as its own, and ten times cheaper."""
    return np.random.default_rng(43).standard_normal(1 << 22, np.float32)
