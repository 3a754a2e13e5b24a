"""The four steps of the recipe; what each one trains, on what, and by which losses.

vision     the vision tower alone: every image token says what stands in its cell and where (training-only layers)
language   the language model over frozen image tokens: the texts; text-only sentences about all equations and about
           choosing cards; positions read off the tokens that speak of them (training-only layers)
head       the action head alone, conditioned by the true goal instead of the reasoning (a training-only embedding)
join       both projectors and the head over the reasoning vectors of the frozen model (the paper's second stage)

`vision` and `language` are the paper's first stage taken apart, because on a CPU the parts train several times faster.
The `head` needs neither and can run beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chatvla_edge.benchmarks.math_matching import batched, texts
from chatvla_edge.benchmarks.math_matching.data import OPS, Moments, cells
from chatvla_edge.benchmarks.math_matching.trainer import Log
from chatvla_edge.drivers.sim.tabletop import PLACES, equations
from chatvla_edge.export.checkpoint.statistics import Statistics
from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.model.scaledp import Block, FinalLayer

GRID = (8, 12)
CELLS = GRID[0] * GRID[1] // 4
NOT_YET_CARRIED = 0.06  # m: a held card below this is still among the others
LIFTED_SHARE = 0.12  # of a batch are such moments, beside those that come by chance
SCALE = 0.1  # m: positions are regressed in these


@dataclass
class World:
    """What every step may look at. highest: largest number on a card."""

    model: ChatVLA2
    prompt: Prompt
    statistics: Statistics
    highest: int
    train: Moments
    test: Moments


def _pick(data: NDArray[np.generic], index: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data[index]))


class _Probes(nn.Module):
    """Training-only layers. Their parameters are named `probe...`: no checkpoint holds them."""

    def named(self) -> dict[str, nn.Parameter]:
        return {f"probe.{name}": value for name, value in self.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ vision


class _Cells(_Probes):
    def __init__(self, hidden: int, highest: int) -> None:
        super().__init__()
        self.digit = nn.Linear(hidden, 11)
        self.op = nn.Linear(hidden, 1 + len(OPS))
        self.card = nn.Linear(hidden, highest + 2)
        self.offset = nn.Linear(hidden, 2)


class Vision:
    """Cell labels and card offsets."""

    name, rate, other_rate, constant, average = "vision", 0.02, 2e-3, 0.4, 0.99

    def __init__(self, world: World, batch: int, compiled: bool) -> None:
        torch.manual_seed(1)
        self.world, self.batch = world, batch
        self.backbone = world.model.backbone
        self.probes = _Cells(world.model.spec.language.hidden, world.highest)
        self.rotary = batched.vision_rotary(self.backbone, *GRID)
        self.images = torch.compile(batched.images, dynamic=False) if compiled else batched.images

    def parameters(self) -> dict[str, nn.Parameter]:
        """Vision tower and probes."""
        visual = {f"backbone.visual.{name}": value for name, value in self.backbone.visual.named_parameters()}
        return visual | self.probes.named()

    def _labels(self, data: Moments, index: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = len(index)
        rows = np.arange(count)
        digit, op, card = (np.zeros((count, CELLS), np.int64) for _ in range(3))
        glyph_cell, _ = cells(data.glyph[index])
        equation = data.equation[index].astype(np.int64)
        digit[rows, glyph_cell[:, 0]] = 1 + equation[:, 0]
        digit[rows, glyph_cell[:, 2]] = 1 + equation[:, 2]
        op[rows, glyph_cell[:, 1]] = 1 + equation[:, 1]
        card_cell, offset = cells(data.card[index])
        card[rows[:, None], card_cell] = 1 + data.numbers[index]
        labels = (digit, op, card, card_cell, offset)
        return tuple(torch.from_numpy(label) for label in labels)  # type: ignore[return-value]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Cross entropies over all cells, smooth L1 of the card offsets."""
        data = self.world.train
        index = rng.integers(len(data), size=self.batch)
        frames = _pick(data.frames, index).float()
        # Light and grain beyond the world's own, drawn anew each time a picture is seen.
        gain = torch.from_numpy(rng.uniform(0.85, 1.15, (self.batch, 1, 1, 3)).astype(np.float32))
        grain = torch.from_numpy(rng.standard_normal(frames.shape, np.float32)) * float(rng.uniform(0, 5))
        seen = batched.patches((frames * gain + grain).clamp(0, 255))
        tokens = self.images(self.backbone, seen, self.rotary)
        digit, op, card, card_cell, offset = self._labels(data, index)
        probes = self.probes
        # Most cells are empty: what is written weighs as much as all of the rest.
        weights = [torch.ones(layer.out_features) for layer in (probes.digit, probes.op, probes.card)]
        for weight, share in zip(weights, (8.0, 8.0, 5.0), strict=True):
            weight[1:] = share
        parts = [
            F.cross_entropy(layer(tokens).flatten(0, 1), label.flatten(), weight)
            for layer, label, weight in zip(
                (probes.digit, probes.op, probes.card), (digit, op, card), weights, strict=True
            )
        ]
        at = probes.offset(tokens).gather(1, card_cell[..., None].expand(-1, -1, 2))
        where = F.smooth_l1_loss(at, offset, beta=0.05)
        total = torch.stack(parts).sum() + 2 * where
        figures = {"loss": total, "digit": parts[0], "card": parts[2], "offset": where}
        return total, {key: float(value.detach()) for key, value in figures.items()}

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Shares of digits, signs and cards named right, median error of card centres in mm."""
        data = self.world.test
        index = np.arange(len(data))
        tokens = see(self.world.model, data, self.batch)
        digit, op, card, card_cell, offset = self._labels(data, index)
        right = {}
        for name, layer, label in (
            ("digit", self.probes.digit, digit),
            ("op", self.probes.op, op),
            ("card", self.probes.card, card),
        ):
            there = label > 0
            right[name] = float((layer(tokens).argmax(-1) == label)[there].float().mean())
        at = self.probes.offset(tokens).gather(1, card_cell[..., None].expand(-1, -1, 2))
        error = ((at - offset) * torch.tensor([0.8 / 6, 0.6 / 4])).norm(dim=-1).median()
        return {f"test_{name}": value for name, value in right.items()} | {"test_card_mm": float(error) * 1e3}


@torch.no_grad()
def see(model: ChatVLA2, data: Moments, batch: int = 100) -> Tensor:
    """Image tokens of all moments, [N, cells, D]."""
    rotary = batched.vision_rotary(model.backbone, *GRID)
    out = [
        batched.images(model.backbone, batched.patches(torch.from_numpy(data.frames[at : at + batch])), rotary)
        for at in range(0, len(data), batch)
    ]
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------------------- language


@dataclass
class Texts:
    """Reasoning texts of moments, and which of their tokens speak of a place.

    ids: [N, L] with the end token, padded; length: [N] with the end token; spot: [N, L] 0 for none, 1 + index of a
    card, 4 for the goal.
    """

    ids: Tensor
    length: Tensor
    spot: Tensor


_CARD_WORDS = tuple(f"({place})" for place in PLACES)


def write_texts(data: Moments, prompt: Prompt) -> Texts:
    """Texts of all moments."""
    rows, spots = [], []
    for index in range(len(data)):
        equation, numbers, place, held = data.said(index)
        assert len(numbers) == 3
        text = texts.reasoning(texts.Situation(equation, numbers, place, held))
        encoded = prompt.tokenizer.encode(text, add_special_tokens=False)
        spot = [0] * (len(encoded.ids) + 1)
        marks = [
            (text.find(word) - len(str(n)) - 1, text.find(word) + len(word), 1 + i)
            for i, (word, n) in enumerate(zip(_CARD_WORDS, numbers, strict=True))
            if word in text
        ]
        marks.append((text.rfind(" from ") + 6, len(text), 4))
        for first, last, mark in marks:
            for token, (begin, end) in enumerate(encoded.offsets):
                if begin >= first and end <= last and end > begin:
                    spot[token] = mark
        rows.append([*encoded.ids, prompt.tokens.im_end])
        spots.append(spot)
    longest = max(map(len, rows))
    ids, marked = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    for index, (row, spot) in enumerate(zip(rows, spots, strict=True)):
        ids[index, : len(row)], marked[index, : len(spot)] = torch.tensor(row), torch.tensor(spot)
    return Texts(ids, torch.tensor([len(row) for row in rows]), marked)


def _picks(numbers: Sequence[int], order: Sequence[int], known: int) -> list[tuple[str, bool]]:
    """The sentence about the cards and a pick of each; the first `known` of the picked numbers can be known."""
    pieces = [(f" {texts.there_are(numbers)}", False)]
    for turn, place in enumerate(order):
        pieces += [
            (" I should pick", False),
            (" ", turn < known),
            (str(numbers[place]), turn < known),
            (" from", False),
            (f" {PLACES[place]}", True),
            (".", False),
        ]
    return pieces


class _Places(_Probes):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.token = nn.Linear(hidden, 2)
        self.pooled = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2))
        self.number = nn.Linear(hidden, 10)


class Language:
    """Texts over frozen image tokens, sentences without an image, and positions."""

    name, rate, other_rate, constant, average = "language", 0.02, 2e-3, 0.45, 0.99

    def __init__(self, world: World, batch: int, sentences: int, feature_file: Path, compiled: bool) -> None:
        torch.manual_seed(2)
        self.attend = torch.compile(batched.attend, dynamic=False) if compiled else batched.attend
        self.world, self.batch, self.sentences = world, batch, sentences
        self.backbone, self.prompt = world.model.backbone, world.prompt
        self.probes = _Places(world.model.spec.language.hidden)
        self.features = _features(feature_file, world.model, world.train)
        self.test_features = see(world.model, world.test)
        self.texts, self.test_texts = write_texts(world.train, world.prompt), write_texts(world.test, world.prompt)
        words = (*PLACES, " from")
        self.asks = {self.prompt.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in words}
        self.figure = {self.prompt.tokenizer.token_to_id(str(figure)): figure for figure in range(10)}
        self.text_figures = torch.tensor([self._figures(row) for row in self.texts.ids.tolist()])
        held = world.train.held
        near = world.train.card[np.arange(len(held)), held.clip(0), 1] < NOT_YET_CARRIED
        self.lifted = np.flatnonzero((held >= 0) & near)
        self.prompt_ids = torch.tensor(self.prompt.ids([GRID], texts.INSTRUCTION))
        self.start = len(self.prompt_ids)
        self.all = equations(world.highest)
        longest = self.start + max(self.texts.ids.shape[1], self.test_texts.ids.shape[1])
        self.count = longest + longest % 2
        ids = torch.cat([self.prompt_ids, torch.zeros(self.count - self.start, dtype=torch.int64)])
        positions, _ = mrope_positions(ids, [GRID], self.prompt.tokens.image_pad)
        self.rotary = batched.language_rotary(self.backbone, positions)
        self.plain = batched.language_rotary(self.backbone, torch.arange(self.count).expand(3, -1))
        self.is_image = self.prompt_ids == self.prompt.tokens.image_pad

    def parameters(self) -> dict[str, nn.Parameter]:
        """Language model and probes; the output head is the embedding."""
        language = {f"backbone.language.{name}": value for name, value in self.backbone.language.named_parameters()}
        return language | self.probes.named()

    def _embedded(self, features: Tensor, ids: Tensor) -> Tensor:
        batch = len(features)
        prompt = self.backbone.embed(self.prompt_ids).expand(batch, -1, -1).clone()
        prompt[:, self.is_image] = features
        words = self.backbone.embed(ids)
        rest = words.new_zeros(batch, self.count - self.start - ids.shape[1], words.shape[2])
        return torch.cat([prompt, words, rest], dim=1)

    def _sentence(self, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        """Sentences without an image: ids and which of them can be known from what stands before.

        An equation (any: what held-out ones make is known from here alone), cards, and picks, the first of them of
        what stands behind the equals sign, right or wrong; then other cards and picks of them.
        """
        equation = self.all[rng.integers(len(self.all))]
        true = bool(rng.random() < 0.5)
        numbers, order = self._cards(rng)
        if true:
            if equation.answer not in numbers:
                numbers[order[0]] = equation.answer
            first = numbers.index(equation.answer)
            order = [first, *(index for index in order if index != first)]
        pieces: list[tuple[str, bool]] = [
            (f"On the whiteboard is {equation}. {equation}=", False),
            (str(numbers[order[0]]), true),
            (".", False),
        ]
        pieces += _picks(numbers, order, known=1)
        ids: list[int] = []
        known: list[bool] = []
        while True:
            new = [
                (token, knowable)
                for text, knowable in pieces
                for token in self.prompt.tokenizer.encode(text, add_special_tokens=False).ids
            ]
            if len(ids) + len(new) > self.count:
                return ids, known
            ids += [token for token, _ in new]
            known += [knowable for _, knowable in new]
            pieces = _picks(*self._cards(rng), known=0)

    def _figures(self, ids: Sequence[int]) -> list[int]:
        """For the words that stand behind a card's number - its place, and `from` - that number's last figure; else -1.

        A layer in the middle is asked for it at these words. Choosing the place of a number is then one look at where
        the same number is known; without it, the choice stays at chance for thousands of steps.
        """
        last, out = -1, []
        for token in ids:
            last = self.figure.get(token, last)
            out.append(last if token in self.asks else -1)
        return out

    def _cards(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Three numbers, and an order to pick them in."""
        numbers = rng.choice(self.world.highest + 1, 3, replace=False).tolist()
        return numbers, rng.permutation(3).tolist()

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Next-token cross entropy (10 tokens of a text are news) and positions in units of SCALE."""
        index = rng.integers(len(self.texts.ids), size=self.batch)
        # A card just lifted looks nearly like one that lies there, and is rare.
        rare = self.lifted[rng.integers(len(self.lifted), size=self.batch)]
        pick = torch.from_numpy(np.where(rng.random(self.batch) < LIFTED_SHARE, rare, index))
        ids = self.texts.ids[pick]
        seen = self._embedded(self.features[pick].float(), ids)
        lines = [self._sentence(rng) for _ in range(self.sentences)]
        words = torch.zeros(self.sentences, self.count, dtype=torch.int64)
        known = torch.zeros(self.sentences, self.count, dtype=torch.bool)
        for row, (line, sure) in enumerate(lines):
            words[row, : len(line)], known[row, : len(sure)] = torch.tensor(line), torch.tensor(sure)
        embedded = torch.cat([seen, self.backbone.embed(words)])
        rotary = tuple(
            torch.cat([a.expand(self.batch, 1, -1, -1), b.expand(self.sentences, 1, -1, -1)])
            for a, b in zip(self.rotary, self.plain, strict=True)
        )
        middle: list[Tensor] = []
        hidden = batched.hidden(self.backbone, embedded, (rotary[0], rotary[1]), self.attend, middle)
        figures = torch.full(words.shape, -1)
        for row, (line, _) in enumerate(lines):
            figures[row, : len(line)] = torch.tensor(self._figures(line))
        spoken = self._rows(middle[0][: self.batch], ids.shape[1])
        asked = torch.cat([self.text_figures[pick].flatten(), figures.flatten()])
        stream = torch.cat([spoken.flatten(0, 1), middle[0][self.batch :].flatten(0, 1)])
        number = F.cross_entropy(self.probes.number(stream[asked >= 0]), asked[asked >= 0])
        said = hidden[: self.batch, self.start - 1 : self.start - 1 + ids.shape[1]]
        real = torch.arange(ids.shape[1]) < self.texts.length[pick][:, None]
        speech = F.cross_entropy(self.backbone.logits(said[real]), ids[real], reduction="sum") / (10 * self.batch)
        before, after = hidden[self.batch :, :-1], words[:, 1:]
        mask = known[:, 1:]
        sentence = F.cross_entropy(self.backbone.logits(before[mask]), after[mask])
        token, pooled = self._where(hidden[: self.batch], pick, self.world.train, self.texts)
        total = speech + sentence + 0.5 * token + 0.5 * pooled + 0.5 * number
        found = {"loss": total, "speech": speech, "sentence": sentence, "token_xy": token, "pooled_xy": pooled}
        return total, {key: float(value.detach()) for key, value in (found | {"number": number}).items()}

    def _rows(self, hidden: Tensor, length: int) -> Tensor:
        """Hidden states of the text's own tokens as inputs, [B, L, D]."""
        return hidden[:, self.start : self.start + length]

    def _where(self, hidden: Tensor, pick: Tensor, data: Moments, said: Texts) -> tuple[Tensor, Tensor]:
        spot, length = said.spot[pick], said.length[pick]
        rows = self._rows(hidden, spot.shape[1])
        index = pick.numpy()
        targets = torch.cat([_pick(data.card, index), _pick(data.goal, index)[:, None]], dim=1) / SCALE
        marked = spot > 0
        wanted = targets.gather(1, (spot - 1).clamp(min=0)[..., None].expand(-1, -1, 2))
        token = F.smooth_l1_loss(self.probes.token(rows[marked]), wanted[marked], beta=0.1)
        pooled = F.smooth_l1_loss(self.probes.pooled(_mean(rows, length - 1)), targets[:, 3], beta=0.1)
        return token, pooled

    @torch.no_grad()
    def vectors(self, features: Tensor, said: Texts, batch: int = 50) -> tuple[Tensor, Tensor, Tensor]:
        """Of all moments with their true texts: prompt and reasoning means [N, D], whether greedy text = true text."""
        prompts, reasons, exact = [], [], []
        for at in range(0, len(features), batch):
            ids, length = said.ids[at : at + batch], said.length[at : at + batch]
            hidden = batched.hidden(self.backbone, self._embedded(features[at : at + batch].float(), ids), self.rotary)
            prompts.append(hidden[:, : self.start].mean(1))
            reasons.append(_mean(self._rows(hidden, ids.shape[1]), length - 1))
            guess = self.backbone.logits(hidden[:, self.start - 1 : self.start - 1 + ids.shape[1]]).argmax(-1)
            beyond = torch.arange(ids.shape[1]) >= length[:, None]
            exact.append(((guess == ids) | beyond).all(1))
        return torch.cat(prompts), torch.cat(reasons), torch.cat(exact)

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Share of texts that are right to the last token, and the goal's error, mm."""
        data = self.world.test
        _, reason, exact = self.vectors(self.test_features, self.test_texts)
        error = (self.probes.pooled(reason) * SCALE - torch.from_numpy(data.goal)).norm(dim=-1)
        before = torch.from_numpy(data.held) < 0
        return {
            "test_text": float(exact.float().mean()),
            "test_text_pick": float(exact[before].float().mean()),
            "test_goal_mm": float(error.median()) * 1e3,
            "test_goal_within_40mm": float((error < 0.04).float().mean()),
        }


def _mean(rows: Tensor, length: Tensor) -> Tensor:
    """Mean over the first `length` rows of [B, L, D]."""
    mask = (torch.arange(rows.shape[1]) < length[:, None])[..., None]
    return (rows * mask).sum(1) / length[:, None]


def _features(path: Path, model: ChatVLA2, data: Moments) -> Tensor:
    """Image tokens of the training data in bf16, kept in a file."""
    if path.is_file():
        kept: Tensor = torch.load(path, weights_only=True)
        if len(kept) == len(data):
            return kept
    out = see(model, data).bfloat16()
    torch.save(out, path)
    return out


# -------------------------------------------------------------------------------------------------------------- head


class _Oracle(_Probes):
    """The goal in place of the reasoning vector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, goal: Tensor) -> Tensor:
        out: Tensor = self.embed(goal / torch.tensor([0.25, 0.15]))
        return out


@dataclass
class Motions:
    """state: [N, 14] and actions: [N, 50, 14], normalised; goal: [N, 2] m."""

    state: Tensor
    actions: Tensor
    goal: Tensor


def motions(data: Moments, numbers: Statistics) -> Motions:
    """The demonstrations of a data set in the head's units."""
    span = numbers.action_max - numbers.action_min
    return Motions(
        torch.from_numpy((data.state - numbers.qpos_mean) / numbers.qpos_std),
        torch.from_numpy((data.actions - numbers.action_min) / span * 2 - 1),
        torch.from_numpy(data.goal),
    )


class _Diffusion:
    """The loss of the head: predicted noise, weighted so that the condition is learnt where it decides everything."""

    def __init__(self, model: ChatVLA2, compiled: bool) -> None:
        self.head, self.sampler = model.head, model.spec.sampler
        self.bars = ddim.alpha_bars(self.sampler)
        self.denoise = torch.compile(self.head, dynamic=False) if compiled else self.head

    def loss(self, conditions: tuple[Tensor, Tensor], actions: Tensor, rng: np.random.Generator) -> Tensor:
        """Half of the time steps are those of the sampler."""
        batch = len(actions)
        stride = self.sampler.train_steps // self.sampler.steps
        coarse = rng.integers(self.sampler.steps, size=batch) * stride
        steps = np.where(rng.random(batch) < 0.5, coarse, rng.integers(self.sampler.train_steps, size=batch))
        at = torch.from_numpy(steps)
        bar = self.bars[at][:, None, None]
        noise = torch.from_numpy(rng.standard_normal(tuple(actions.shape), np.float32))
        guess = self.denoise(bar.sqrt() * actions + (1 - bar).sqrt() * noise, at, conditions)
        weight = ((1 - bar) / bar).clamp(0.05, 10)
        out: Tensor = (weight * (guess - noise) ** 2).mean()
        return out

    @torch.no_grad()
    def judge(self, conditions: tuple[Tensor, Tensor], data: Motions, numbers: Statistics) -> dict[str, float]:
        """Median and 90th percentile over moments of the largest joint error of a sampled chunk, mrad."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(data.actions.shape, generator=generator)
        sampled = self.head.sample(noise, conditions, self.sampler)
        span = torch.from_numpy(numbers.action_max - numbers.action_min) / 2
        error = ((sampled - data.actions) * span).abs()
        joints = [index for index in range(14) if index % 7 in (0, 1)]
        worst = error[:, -1, joints].amax(-1) * 1e3
        grip = error[:, :, [6, 13]].amax(dim=(1, 2)) * 1e3
        return {
            "test_end_mrad": float(worst.median()),
            "test_end_mrad_p90": float(worst.quantile(0.9)),
            "test_gripper_mm": float(grip.median()),
        }


class Head:
    """The head on the true goal."""

    name, rate, other_rate, constant, average = "head", 0.02, 2e-3, 0.45, 0.998

    def __init__(self, world: World, batch: int, compiled: bool) -> None:
        torch.manual_seed(3)
        self.world, self.batch = world, batch
        self.model = world.model
        self.oracle = _Oracle(world.model.spec.language.hidden)
        self.diffusion = _Diffusion(world.model, compiled)
        self.data, self.test = motions(world.train, world.statistics), motions(world.test, world.statistics)
        _zero_gates(world.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Head and the oracle's embedding."""
        return {f"head.{name}": value for name, value in self.model.head.named_parameters()} | self.oracle.named()

    def _conditions(self, goal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        vector = self.oracle(goal)
        pair: tuple[Tensor, Tensor] = self.model.head.condition(vector, vector, state)
        return pair

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Goals off by a few millimetres, as the reasoning vector's will be."""
        pick = torch.from_numpy(rng.integers(len(self.data.state), size=self.batch))
        loss = self.diffusion.loss(
            self._conditions(self.data.goal[pick], self.data.state[pick]), self.data.actions[pick], rng
        )
        return loss, {"loss": float(loss.detach())}

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Sampled chunks against the expert's."""
        conditions = self._conditions(self.test.goal, self.test.state)
        return self.diffusion.judge(conditions, self.test, self.world.statistics)


def _zero_gates(model: ChatVLA2) -> None:
    """adaLN-Zero: every block starts as the identity, and the last layer says nothing."""
    last = model.head.final_layer
    modulations = [part for part in model.head.modules() if isinstance(part, (Block, FinalLayer))]
    with torch.no_grad():
        for part in (*(part.adaLN_modulation for part in modulations), last.linear):
            for value in part.parameters():
                value.zero_()
        nn.init.normal_(model.head.pos_embed, std=0.02)


# -------------------------------------------------------------------------------------------------------------- join


MOST_VECTORS = 8_000  # reasoning vectors to learn from: each costs a pass of the language model


class Join:
    """The head on real reasoning vectors; the language model frozen, its vectors cached."""

    name, rate, other_rate, constant, average = "join", 0.002, 4e-4, 0.3, 0.99

    def __init__(self, world: World, language: Language, oracle: dict[str, Tensor], batch: int, compiled: bool) -> None:
        torch.manual_seed(4)
        self.world, self.batch, self.model = world, batch, world.model
        self.diffusion = _Diffusion(world.model, compiled)
        data, self.test = motions(world.train, world.statistics), motions(world.test, world.statistics)
        self.data = Motions(data.state[:MOST_VECTORS], data.actions[:MOST_VECTORS], data.goal[:MOST_VECTORS])
        self.vectors = language.vectors(language.features[:MOST_VECTORS], language.texts)
        self.test_vectors = language.vectors(language.test_features, language.test_texts)
        self.oracle = _Oracle(world.model.spec.language.hidden)
        self.oracle.load_state_dict({name: oracle[f"probe.{name}"] for name, _ in self.oracle.named_parameters()})

    def fit(self, steps: int, folder: Path, log: Log) -> None:
        """Fit the reasoning projector to the oracle's embedding, in the head's metric; the input's part starts at 0."""
        head, fusion = self.model.head, self.model.fusion
        with torch.no_grad():
            for value in fusion.input_projector[2].parameters():
                value.zero_()
            wanted = self.oracle(self.data.goal)
        parameters = list(fusion.reasoning_projector.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        hidden = wanted.shape[1]
        metric = torch.cat([head.cond_obs_emb.weight[:, :hidden], head.cond_reasoning_emb.weight[:, :hidden]]).detach()
        unexplained = 0.0
        for at in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * 0.5 * (1 + float(np.cos(np.pi * at / steps)))
            rng = np.random.default_rng([at, 46])
            pick = torch.from_numpy(rng.integers(len(wanted), size=512))
            guess = head.norm_after_pool(fusion.reasoning_projector(self.vectors[1][pick]))
            right = head.norm_after_pool(wanted[pick]).detach()
            difference, spread = (guess - right) @ metric.T, (right - right.mean(0)) @ metric.T
            loss = (difference**2).mean() / (spread**2).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            unexplained = float(loss)
        log.write("fit", steps, {"unexplained": unexplained, **self.judge()})

    def parameters(self) -> dict[str, nn.Parameter]:
        """Projectors and head."""
        parts = (("fusion", self.model.fusion), ("head", self.model.head))
        return {f"{part}.{name}": value for part, module in parts for name, value in module.named_parameters()}

    def _conditions(self, vectors: tuple[Tensor, Tensor, Tensor], pick: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        observed, reasoned = self.model.fusion(vectors[0][pick], vectors[1][pick])
        pair: tuple[Tensor, Tensor] = self.model.head.condition(observed, reasoned, state)
        return pair

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """As the head's."""
        pick = torch.from_numpy(rng.integers(len(self.data.state), size=self.batch))
        conditions = self._conditions(self.vectors, pick, self.data.state[pick])
        loss = self.diffusion.loss(conditions, self.data.actions[pick], rng)
        return loss, {"loss": float(loss.detach())}

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Sampled chunks against the expert's, true texts."""
        everything = torch.arange(len(self.test.state))
        conditions = self._conditions(self.test_vectors, everything, self.test.state)
        return self.diffusion.judge(conditions, self.test, self.world.statistics)
