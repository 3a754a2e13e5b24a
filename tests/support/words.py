"""A byte-level BPE tokenizer built like Qwen2's, with its special tokens at the ids of the tiny geometry."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from support import tiny

# Qwen2's split: contractions, words with one leading sign, single digits, punctuation, newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Answer the question and pick the card with the correct answer. Next Action:",
    "Put the red cup on the table, then answer: 1 + 2 = 3?\n\n",
    "\n\n",  # Qwen2 has this merge: a newline joins the one before it, so it matters where a text is cut
] * 30


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    names = sorted(type(tiny.TOKENS).model_fields, key=lambda name: getattr(tiny.TOKENS, name))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in names])
    return tokenizer.to_str()


def tokenizer() -> Tokenizer:
    """256 bytes, 44 merges (ids below 300), then the six special tokens."""
    return Tokenizer.from_str(_trained())
