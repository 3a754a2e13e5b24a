"""A checkpoint's tokenizer, and a small one for synthetic checkpoints.

Public checkpoints carry Qwen2's tokenizer; its vocabulary is not ours to make, so a synthetic checkpoint gets a
byte-level one with Qwen2's splitting rule and the special tokens at the ids its configuration names.
"""

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from chatvla_edge.export.checkpoint.errors import refusal
from chatvla_edge.export.checkpoint.files import inside
from chatvla_edge.export.model.prompt import SPECIAL, Prompt
from chatvla_edge.export.spec import PolicySpec, TokenSpec

# Qwen2's file has 7 MB, with half of it spelled out merges.
LARGEST = 64 << 20
# Qwen2 splits text so before merging bytes: contractions, words, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer(tokens: TokenSpec) -> str:
    """The text of a tokenizer.json with one token per byte and the special tokens at their ids."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {text: getattr(tokens, field) for text, field in SPECIAL.items()}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": index,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for text, index in sorted(special.items(), key=lambda item: item[1])
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            # The special tokens stand in the vocabulary too, or the library would renumber them behind the bytes.
            "model": {"type": "BPE", "vocab": {**vocabulary, **special}, "merges": []},
        },
        ensure_ascii=False,
    )


def find_tokenizer(path: Path) -> Path:
    """tokenizer.json of a checkpoint, or of the folder above, where LoRA runs keep it.

    Raises:
        CheckpointError: there is none, it is a link that leaves its folder, or larger than any tokenizer.
    """
    for folder in (path, path.parent):
        if (folder / "tokenizer.json").is_file():
            file = inside(folder, "tokenizer.json", folder)
            if (size := file.stat().st_size) > LARGEST:
                raise refusal(
                    file, found=f"{size} bytes", expected=f"a tokenizer of at most {LARGEST}", do="Copy it again."
                )
            return file
    raise refusal(
        path,
        found="no tokenizer.json here nor in the folder above",
        expected="the tokenizer the model was trained with",
        do="Copy tokenizer.json of Qwen2-VL beside the weights; it can be saved from any Qwen2-VL checkpoint folder.",
    )


def read_prompt(path: Path, spec: PolicySpec) -> Prompt:
    """The prompt builder of a checkpoint, over its tokenizer. Raises CheckpointError for one of another vocabulary."""
    file = find_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for any unreadable file
        raise refusal(file, found=str(error), expected="a tokenizer.json", do="Copy it again.") from None
    ids = Counter(tokenizer.get_vocab(with_added_tokens=True).values())
    beyond = sorted(index for index in ids if index >= spec.language.vocab)
    twice = sorted(index for index, count in ids.items() if count > 1)
    if beyond or twice:
        rows = spec.language.vocab
        found = f"the id {beyond[0]} and {len(beyond) - 1} more beyond it" if beyond else f"two tokens of id {twice[0]}"
        raise refusal(
            file,
            found=found,
            expected=f"ids that differ, below {rows}: the rows of the embedding",
            do="This tokenizer belongs to another checkpoint: copy the one that the model was trained with.",
        )
    return Prompt(tokenizer, spec.tokens, spec.vision.merge)
