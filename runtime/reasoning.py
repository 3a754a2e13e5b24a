"""The reasoning of a query: greedy decoding, and the same text found faster from a draft.

Greedy decoding defines the result. A draft (the previous query's reasoning) is appended to the prompt and verified in
the same pass: the model says after each row which token follows, and as long as that is the draft's next token, the
row stands. At the first miss the model's own token is taken, and the rest of the draft is tried behind it.

Why this is exact: a row's numbers do not depend on the rows beside it, as long as the engine sees an even number of
rows (measured on ONNX Runtime; the test suite asserts it bit by bit on the machine it runs on). So every pass here has
an even number of rows, padded by a row that nothing reads and whose place in the cache the next pass overwrites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.engines import Array, Buffers, Engine

Float = NDArray[np.float32]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class LanguageSizes:
    """What the language stage is laid out for. capacity: cache rows, prompt and reasoning and one row of padding."""

    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    capacity: int


@dataclass(frozen=True)
class PromptRows:
    """A prompt ready for the language stage: ids [P], positions [3, P], the rows [I] that are image tokens."""

    ids: Int
    positions: Int
    image_rows: Int

    @property
    def following(self) -> int:
        """Position of the first token behind the prompt."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class Reasoning:
    """token_ids: N tokens, end token included unless the bound cut them. passes: runs of the language stage.

    prompt_mean, reasoning_mean: [D]; routing: [layers, E] expert visits of prompt and reasoning rows.
    accepted: draft tokens that were confirmed.
    """

    token_ids: list[int]
    prompt_mean: Float
    reasoning_mean: Float
    routing: Int
    passes: int
    accepted: int


class LanguageModel:
    """The language stage with its cache and buffers."""

    def __init__(self, engine: Engine, sizes: LanguageSizes, routed_layers: Sequence[int]) -> None:
        self.engine = engine
        self.sizes = sizes
        self.routed_layers = tuple(routed_layers)
        capacity, hidden = sizes.capacity, sizes.hidden
        buffers = Buffers()
        for name, size, dtype in (
            ("token_ids", capacity, np.int64),
            ("positions", 3 * capacity, np.int64),
            ("token", capacity, np.int64),
            ("top2_logits", 2 * capacity, np.float32),
            ("hidden", capacity * hidden, np.float32),
            ("hidden_sum", hidden, np.float32),
            *((f"routing_{layer}", capacity * sizes.top_k, np.int64) for layer in self.routed_layers),
        ):
            buffers.reserve(name, size, dtype)
        self._buffers = buffers
        shape = (1, sizes.kv_heads, capacity, sizes.head_dim)
        self._cache = {
            f"{kind}_{layer}": np.zeros(shape, np.float32) for layer in range(sizes.layers) for kind in ("key", "value")
        }
        self._scalars = {name: np.zeros(1, np.int64) for name in ("length", "first_row", "sum_stop")}
        self._no_image = np.zeros((0, hidden), np.float32)
        self._no_rows = np.zeros(0, np.int64)

    def forward(
        self,
        ids: Sequence[int] | Int,
        positions: Int,
        *,
        length: int,
        first_row: int,
        sum_stop: int = 0,
        images: tuple[Float, Int] | None = None,
    ) -> Mapping[str, Array]:
        """Run T rows behind `length` cached ones; an odd T is padded. Outputs are views, valid until the next run.

        ids [T], positions [3, T]; images: image tokens [I, D] and the rows [I] they stand in; outputs start at row
        `first_row` rounded down to even: see `rows_from`.
        """
        count = len(ids)
        padded = count + count % 2
        if length + padded > self.sizes.capacity:
            raise ValueError(
                f"the cache holds {self.sizes.capacity} rows, {length + padded} are needed: the instruction or the "
                "reasoning is longer than this bundle was exported for"
            )
        view = self._buffers.view
        row_ids, row_positions = view("token_ids", padded), view("positions", 3, padded)
        row_ids[:count], row_positions[:, :count] = ids, positions
        row_ids[count:], row_positions[:, count:] = row_ids[count - 1], row_positions[:, count - 1 : count]
        for name, value in (("length", length), ("first_row", rows_from(first_row)), ("sum_stop", sum_stop)):
            self._scalars[name][0] = value
        given = padded - rows_from(first_row)
        image_tokens, image_rows = images or (self._no_image, self._no_rows)
        inputs: dict[str, Array] = {
            "token_ids": row_ids,
            "positions": row_positions,
            "image_tokens": image_tokens,
            "image_rows": image_rows,
            **self._scalars,
            **{f"past_{name}": array for name, array in self._cache.items()},
        }
        outputs: dict[str, Array] = {
            "token": view("token", given),
            "top2_logits": view("top2_logits", given, 2),
            "hidden": view("hidden", given, self.sizes.hidden),
            "hidden_sum": view("hidden_sum", self.sizes.hidden),
            **{f"routing_{layer}": view(f"routing_{layer}", padded, self.sizes.top_k) for layer in self.routed_layers},
            **{f"present_{name}": array for name, array in self._cache.items()},
        }
        self.engine.run(inputs, outputs)
        return outputs


def rows_from(row: int) -> int:
    """The even row at or before `row`: the engine's output rows come in even numbers, too."""
    return row - row % 2


class _Text:
    """What has been decided so far, and the sums that go with it."""

    def __init__(self, hidden: int, layers: int, experts: int) -> None:
        self.tokens: list[int] = []
        self.fed = 0  # tokens whose own row has been summed
        # fp64, row by row in order: the same sum however the rows were grouped into passes.
        self.sum = np.zeros(hidden, np.float64)
        self.routing = np.zeros((layers, experts), np.int64)

    def count(self, outputs: Mapping[str, Array], routed: Sequence[int], start: int, stop: int) -> None:
        """Count the experts that rows start .. stop-1 visited."""
        for index, layer in enumerate(routed):
            ids = outputs[f"routing_{layer}"][start:stop].ravel()
            self.routing[index] += np.bincount(ids, minlength=self.routing.shape[1])


def reason(
    model: LanguageModel,
    prompt: PromptRows,
    image_tokens: Float,
    *,
    stop: int,
    max_tokens: int,
    draft: Sequence[int] = (),
) -> Reasoning:
    """The greedy reasoning to a prompt.

    image_tokens: [I, D]; stop: the end-of-turn token; draft: tokens to try, empty for plain greedy decoding. The
    result (tokens, means, routing) is the same for every draft; only `passes` and `accepted` differ.

    N generated tokens leave N-1 decode rows; their mean is the reasoning vector. For N = 1 it is the last prompt row.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
    sizes, rows = model.sizes, len(prompt.ids)
    text = _Text(sizes.hidden, len(model.routed_layers), sizes.experts)
    # The end token is never fed, and the last of max_tokens tokens is not fed either.
    hopes = list(draft)
    hopes = hopes[: hopes.index(stop)] if stop in hopes else hopes
    hopes = hopes[: max_tokens - 1]
    following, passes, accepted = prompt.following, 0, 0
    prompt_mean = last_row = np.zeros(sizes.hidden, np.float32)
    while not text.tokens or (text.tokens[-1] != stop and len(text.tokens) < max_tokens):
        # Rows of this pass: what is known and not yet fed (the prompt, or the last token), then the draft's rest.
        known = len(text.tokens)
        tail = hopes[known:]
        if known == 0:
            ids = np.concatenate([prompt.ids, np.asarray(tail, np.int64)])
            places = np.concatenate([prompt.positions, _line(following, len(tail))], axis=1)
            base, length = rows - 1, 0
            seen: tuple[Float, Int] | None = (image_tokens, prompt.image_rows)
        else:
            ids = np.asarray([text.tokens[-1], *tail], np.int64)
            places = _line(following + known - 1, 1 + len(tail))
            base, length = 0, rows + known - 1
            seen = None
        outputs = model.forward(
            ids, places, length=length, first_row=base, sum_stop=rows if known == 0 else 0, images=seen
        )
        passes += 1
        skipped = base - rows_from(base)
        tokens, hidden = outputs["token"][skipped:], outputs["hidden"][skipped:]
        if known == 0:
            prompt_mean = (outputs["hidden_sum"] / np.float32(rows)).astype(np.float32)
            last_row = hidden[0].copy()
        # Row `base` says what follows everything known; each confirmed draft token makes the next row speak.
        confirmed = 0
        while True:
            token = int(tokens[confirmed])
            text.tokens.append(token)
            ended = token == stop or len(text.tokens) == max_tokens
            if ended or confirmed == len(tail) or token != tail[confirmed]:
                break
            confirmed += 1
        accepted += confirmed
        # Rows whose token is now known to have been fed: the last known one (if any) and the confirmed draft.
        fed = (0 if known == 0 else 1) + confirmed
        first = 1 if known == 0 else 0
        for row in hidden[first : first + fed]:
            text.sum += row
        text.fed += fed
        text.count(outputs, model.routed_layers, 0, base + confirmed + 1)
    decoded = len(text.tokens) - 1
    assert text.fed == decoded
    mean = (text.sum / decoded).astype(np.float32) if decoded else last_row
    return Reasoning(text.tokens, prompt_mean, mean, text.routing, passes, accepted)


def reread(model: LanguageModel, prompt: PromptRows, image_tokens: Float, earlier: Reasoning) -> Reasoning:
    """An earlier reasoning to a new prompt, in one pass: words and their mean stay, the mean over the prompt is new."""
    rows = len(prompt.ids)
    outputs = model.forward(
        prompt.ids,
        prompt.positions,
        length=0,
        first_row=rows - 1,
        sum_stop=rows,
        images=(image_tokens, prompt.image_rows),
    )
    text = _Text(model.sizes.hidden, len(model.routed_layers), model.sizes.experts)
    text.count(outputs, model.routed_layers, 0, rows)
    mean = (outputs["hidden_sum"] / np.float32(rows)).astype(np.float32)
    return Reasoning(list(earlier.token_ids), mean, earlier.reasoning_mean, text.routing, 1, 0)


def follow(model: LanguageModel, prompt: PromptRows, image_tokens: Float, token_ids: Int) -> tuple[Float, Int, Int]:
    """Feed prompt and a given text in one pass: hidden [P+N-1, D], said tokens [N], routing [layers, P+N-1, k]."""
    rows, fed = len(prompt.ids), token_ids[:-1]
    ids = np.concatenate([prompt.ids, fed])
    places = np.concatenate([prompt.positions, _line(prompt.following, len(fed))], axis=1)
    outputs = model.forward(ids, places, length=0, first_row=0, images=(image_tokens, prompt.image_rows))
    count = len(ids)
    routing = [outputs[f"routing_{layer}"][:count] for layer in model.routed_layers]
    stacked = np.stack(routing) if routing else np.zeros((0, count, 0), np.int64)
    return outputs["hidden"][:count].copy(), outputs["token"][rows - 1 : count].copy(), stacked


def follow_by_rows(model: LanguageModel, prompt: PromptRows, image_tokens: Float, token_ids: Int) -> tuple[Float, Int]:
    """Feed prompt and text as plain decoding does, a pass for each token: hidden [N, D], said tokens [N].

    The rows are those that speak: the last of the prompt, then the text's. They must be the very bits of `follow`.
    """
    rows = len(prompt.ids)
    hidden, tokens = [], []
    for index in range(len(token_ids)):
        if index == 0:
            ids, places, base, length = prompt.ids, prompt.positions, rows - 1, 0
        else:
            ids, places = token_ids[index - 1 : index], _line(prompt.following + index - 1, 1)
            base, length = 0, rows + index - 1
        seen = (image_tokens, prompt.image_rows) if index == 0 else None
        outputs = model.forward(ids, places, length=length, first_row=base, images=seen)
        at = base - rows_from(base)
        hidden.append(outputs["hidden"][at].copy())
        tokens.append(int(outputs["token"][at]))
    return np.stack(hidden), np.asarray(tokens, np.int64)


def _line(start: int, count: int) -> Int:
    """Positions of text: one index on all three axes."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))
