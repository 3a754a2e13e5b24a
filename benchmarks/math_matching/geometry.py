"""The nano policy: every part of ChatVLA-2 (8 experts, top-2, reasoning-following head) in four million parameters."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chatvla_edge.benchmarks.math_matching.texts import INSTRUCTION, Situation, reasoning
from chatvla_edge.drivers.sim.tabletop import ACTIONS, equations
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.tokenizer import SPLIT
from chatvla_edge.export.model.prompt import SPECIAL, SYSTEM
from chatvla_edge.export.spec import (
    ExpertsSpec,
    HeadSpec,
    LanguageSpec,
    PolicySpec,
    ReasoningSpec,
    TokenSpec,
    VisionSpec,
)

LAYOUT = Layout(head_qkv="split")
HIDDEN, HEAD_WIDTH, HORIZON = 128, 96, 50


def tokenizer() -> str:
    """The text of a tokenizer.json: Qwen2's splitting rule, a byte-level vocabulary with the words of the game.

    Digits stay single tokens, as in Qwen2; a text of the game has about as many tokens as it has there.
    """
    out = Tokenizer(models.BPE())
    out.normalizer = normalizers.NFC()
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    out.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)  # type: ignore[call-arg]
    corpus = [f"system\n{SYSTEM}", "user\n", INSTRUCTION, "assistant\n", "\n"]
    for equation in equations(81):
        for held in (None, 0):
            for place in range(3):
                corpus.append(reasoning(Situation(equation, (0, 1, 2), place, held if held is None else place)))
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    out.train_from_iterator(corpus, trainer)
    table = json.loads(out.to_str())
    vocabulary = table["model"]["vocab"]
    special = {text: len(vocabulary) + index for index, text in enumerate(SPECIAL)}
    table["added_tokens"] = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, index in special.items()
    ]
    # In the vocabulary too, or the library would renumber them.
    table["model"]["vocab"] = {**vocabulary, **special}
    return json.dumps(table, ensure_ascii=False)


def spec(tokenizer_json: str) -> PolicySpec:
    """The nano geometry for a tokenizer."""
    words = Tokenizer.from_str(tokenizer_json)
    vocabulary_of = words.get_vocab(with_added_tokens=True)
    ids = {field: vocabulary_of[text] for text, field in SPECIAL.items()}
    # A multiple of 32: whole rows for the output head's kernels.
    vocabulary = -(-words.get_vocab_size() // 32) * 32
    return PolicySpec(
        vision=VisionSpec(depth=3, embed_dim=128, heads=4),
        language=LanguageSpec(
            vocab=vocabulary,
            hidden=HIDDEN,
            layers=4,
            heads=4,
            kv_heads=2,
            head_dim=32,
            intermediate=128,
            rope_theta=1e4,
            mrope_section=(4, 6, 6),
            experts=ExpertsSpec(routed=8, top_k=2),
        ),
        head=HeadSpec(
            depth=4,
            width=HEAD_WIDTH,
            heads=4,
            mlp_width=4 * HEAD_WIDTH,
            action_dim=ACTIONS,
            state_dim=ACTIONS,
            horizon=HORIZON,
            cond_dim=HIDDEN,
            reasoning=ReasoningSpec(start=2, stop=4),
        ),
        tokens=TokenSpec(**ids),
    )
