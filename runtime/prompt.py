"""The prompt of a query as the language stage takes it: token ids, positions on three axes, rows of image tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from chatvla_edge.runtime.bundle import Prompt, Tokens
from chatvla_edge.runtime.reasoning import PromptRows

Grid = tuple[int, int]
"""(rows, columns) of patches of one image, before merging."""


class PromptBuilder:
    """Puts prompts together for fixed cameras; everything but the instruction is done once."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, grids: Sequence[Grid], merge: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_tokens(tokenizer, prompt.tokens)
        self._tokenizer = tokenizer
        self._special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        before, rest = prompt.template.split("{images}")
        self._between, self._after = rest.split("{instruction}")
        tokens = prompt.tokens
        ids = self._encode(before)
        offset = len(ids)
        positions = [np.tile(np.arange(offset), (3, 1))]
        images: list[int] = []
        for rows, columns in grids:
            height, width = rows // merge, columns // merge
            ids.append(tokens.vision_start)
            positions.append(np.full((3, 1), offset))
            offset += 1
            images.extend(range(len(ids), len(ids) + height * width))
            ids.extend([tokens.image_pad] * (height * width))
            # An image keeps the time index and walks its merged grid; text goes on behind its longer side.
            time = np.zeros(height * width, np.int64)
            down, across = np.repeat(np.arange(height), width), np.tile(np.arange(width), height)
            positions.append(offset + np.stack([time, down, across]))
            offset += max(height, width)
            ids.append(tokens.vision_end)
            positions.append(np.full((3, 1), offset))
            offset += 1
        self._head = ids
        self._positions = np.concatenate(positions, axis=1).astype(np.int64)
        self._image_rows = np.asarray(images, np.int64)
        self._offset = offset

    @classmethod
    def from_file(cls, path: Path, prompt: Prompt, grids: Sequence[Grid], merge: int) -> "PromptBuilder":
        """From a bundle's tokenizer.json."""
        return cls(Tokenizer.from_file(str(path)), prompt, grids, merge)

    def rows(self, instruction: str) -> PromptRows:
        """The prompt for an instruction.

        Raises ValueError for an empty one, and for one that spells a special token: it could end the turn or pose as
        an image.
        """
        if not instruction.strip():
            raise ValueError("the instruction is empty; say what the robot should do")
        for text in self._special:
            if text in instruction:
                raise ValueError(f"the instruction holds the special token {text}; write it without")
        tail = self._encode(self._between + instruction + self._after)
        places = np.tile(np.arange(self._offset, self._offset + len(tail)), (3, 1))
        return PromptRows(
            np.asarray(self._head + tail, np.int64),
            np.concatenate([self._positions, places], axis=1),
            self._image_rows,
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """Generated text without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def tokens(self, text: str) -> list[int]:
        """Tokens of a reasoning text, e.g. to use it as a draft."""
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _check_tokens(tokenizer: Tokenizer, tokens: Tokens) -> None:
    named = {
        "<|im_start|>": tokens.im_start,
        "<|im_end|>": tokens.im_end,
        "<|vision_start|>": tokens.vision_start,
        "<|vision_end|>": tokens.vision_end,
        "<|image_pad|>": tokens.image_pad,
        "<|endoftext|>": tokens.endoftext,
    }
    for text, expected in named.items():
        found: int | None = tokenizer.token_to_id(text)
        if found != expected:
            raise ValueError(f"the tokenizer gives {text} the id {found}, the manifest says {expected}")
