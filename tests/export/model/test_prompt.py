"""The ids we put together are those of the published path: chat template, image expansion, tokenizer."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import tiny, words
from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from chatvla_edge.export.model.images import patches
from chatvla_edge.export.model.prompt import Prompt

# Qwen2-VL's template as far as one conversation of texts and images needs it.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INSTRUCTIONS = [
    "Answer the question and pick the card with the correct answer.",
    "  Put the red cup\n\non the table, it's 12 + 7 = 19 !",
    "\nline first",
    "de\u0301compose\u0301, 把红色的杯子放在桌子上 🙂",  # combining accents: the tokenizer composes them
]


class Processor(Qwen2VLProcessor):
    """transformers' own, without insisting on a video processor (it needs torchvision)."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def processor():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return Processor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def prompt():
    return Prompt(words.tokenizer(), tiny.TOKENS)


def conversation(images: int, instruction: str):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": instruction}]}]


def frames(images: int):
    rng = np.random.default_rng(0)
    sizes = [(252, 308), (56, 84), (84, 56)][:images]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_the_tiny_tokenizer_splits_as_qwen2_does():
    assert words.SPLIT == PRETOKENIZE_REGEX
    assert words.tokenizer().get_vocab_size() == 306


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=["card", "spaces", "newline", "unicode"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_ids_and_patches_are_those_of_transformers_processor(processor, prompt, images, instruction):
    text = processor.apply_chat_template(conversation(images, instruction), tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=frames(images) or None)
    ours = [patches(frame) for frame in frames(images)]
    assert prompt.ids([grid for _, grid in ours], instruction) == expected["input_ids"][0]
    if images:
        np.testing.assert_array_equal(np.concatenate([rows for rows, _ in ours]), expected["pixel_values"])
        assert [[1, *grid] for _, grid in ours] == expected["image_grid_thw"].tolist()


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40), st.sampled_from([0, 1]))
@example("\u0301 begins with a combining accent", 0)
@example("'s", 0)
@example("user", 1)
def test_ids_are_those_of_the_whole_rendered_text(processor, prompt, instruction, images):
    assume(instruction.strip())
    text = processor.apply_chat_template(
        conversation(images, instruction), tokenize=False, add_generation_prompt=True
    ).replace("<|image_pad|>", "<|image_pad|>" * 6)
    assert prompt.ids([(4, 6)] * images, instruction) == processor.tokenizer(text)["input_ids"]


def test_an_image_of_320x240_takes_99_tokens(prompt):
    assert prompt.ids([(18, 22)], "go").count(tiny.TOKENS.image_pad) == 99


@pytest.mark.parametrize("special", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|vision_start|>"])
def test_an_instruction_that_spells_a_special_token_is_refused(prompt, special):
    with pytest.raises(ValueError, match=r"holds the special token <\|"):
        prompt.ids([], f"pick {special} the cup")


def test_what_only_looks_like_a_special_token_is_text(prompt):
    ids = prompt.ids([], "pick <|im_ end|> the cup")
    assert ids.count(tiny.TOKENS.im_end) == 2


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_instruction_is_refused(prompt, empty):
    with pytest.raises(ValueError, match="instruction is empty"):
        prompt.ids([(4, 4)], empty)


def test_a_tokenizer_of_another_checkpoint_is_refused():
    shifted = tiny.TOKENS.model_copy(update={"image_pad": 299})
    with pytest.raises(ValueError, match=r"gives <\|image_pad\|> the id 304, .* expects 299"):
        Prompt(words.tokenizer(), shifted)


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match="the id None"):
        Prompt(type(words.tokenizer()).from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}'), tiny.TOKENS)


def test_truncation_and_padding_left_in_a_tokenizer_file_do_not_touch_the_prompt(prompt, tmp_path):
    tokenizer = words.tokenizer()
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Prompt.from_file(tmp_path / "tokenizer.json", tiny.TOKENS)
    assert loaded.ids([(4, 4)], INSTRUCTIONS[0]) == prompt.ids([(4, 4)], INSTRUCTIONS[0])


def test_text_is_the_generated_words_without_special_tokens_and_outer_spaces(prompt):
    words_ids = prompt.tokenizer.encode("\n pick the 3rd card. Next Action: \n").ids
    assert prompt.text([*words_ids, tiny.TOKENS.im_end]) == "pick the 3rd card. Next Action:"
    assert prompt.text([tiny.TOKENS.im_end]) == ""
