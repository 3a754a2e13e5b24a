"""The prompt of a query: Qwen2-VL's chat template with one user turn, spelled out once per instruction.

The published processor renders the template to text, repeats the image token once per merged patch and tokenises the
whole; here the ids are put together directly, which is the same as long as the instruction holds no special token.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from chatvla_edge.export.model.backbone import Grid
from chatvla_edge.export.spec import TokenSpec

SYSTEM = "You are a helpful assistant."

SPECIAL = {
    "<|endoftext|>": "endoftext",
    "<|im_start|>": "im_start",
    "<|im_end|>": "im_end",
    "<|vision_start|>": "vision_start",
    "<|vision_end|>": "vision_end",
    "<|image_pad|>": "image_pad",
}


class Prompt:
    """A tokenizer and the template around it."""

    def __init__(self, tokenizer: Tokenizer, tokens: TokenSpec, merge: int = 2) -> None:
        for text, field in SPECIAL.items():
            found, expected = tokenizer.token_to_id(text), getattr(tokens, field)
            if found != expected:
                raise ValueError(
                    f"the tokenizer gives {text} the id {found}, the checkpoint's configuration expects {expected}: "
                    "this tokenizer belongs to another checkpoint"
                )
        # A tokenizer.json keeps whatever truncation and padding its last user had set; here the ids are the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.merge = merge

    @classmethod
    def from_file(cls, path: Path, tokens: TokenSpec, merge: int = 2) -> "Prompt":
        """From a `tokenizer.json`."""
        return cls(Tokenizer.from_file(str(path)), tokens, merge)

    def ids(self, grids: Sequence[Grid], instruction: str) -> list[int]:
        """Token ids of a query: system turn, images in camera order, instruction, and the start of the answer.

        Raises ValueError for an instruction that spells a special token: it could end the turn or pose as an image.
        """
        if not instruction.strip():
            raise ValueError("the instruction is empty; say what the robot should do")
        for text in self.tokenizer.get_added_tokens_decoder().values():
            if text.content in instruction:
                raise ValueError(f"the instruction holds the special token {text.content}; write it without")
        images = [
            token
            for rows, columns in grids
            for token in (
                self.tokens.vision_start,
                *[self.tokens.image_pad] * (rows * columns // self.merge**2),
                self.tokens.vision_end,
            )
        ]
        return [
            self.tokens.im_start,
            *self._encode(f"system\n{SYSTEM}"),
            self.tokens.im_end,
            *self._encode("\n"),
            self.tokens.im_start,
            *self._user(images, instruction),
            self.tokens.im_end,
            *self._encode("\n"),
            self.tokens.im_start,
            *self._encode("assistant\n"),
        ]

    def _user(self, images: list[int], instruction: str) -> list[int]:
        if images:
            return self._encode("user\n") + images + self._encode(instruction)
        # Without an image nothing parts the role from the instruction: the tokenizer must see them as one text.
        return self._encode("user\n" + instruction)

    def text(self, token_ids: Sequence[int]) -> str:
        """Generated text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
