"""Our backbone is transformers' Qwen2-VL: same logits, same hidden states, same greedy tokens."""

import pytest
import torch
from support import tiny
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.cache_utils import DynamicCache

from chatvla_edge.export.model.backbone import mrope_positions

GRIDS = {1: [(8, 12)], 3: [(8, 12), (4, 4), (6, 10)]}


@pytest.fixture(scope="module")
def ours():
    return tiny.model(tiny.policy(tiny.DENSE)).backbone


@pytest.fixture(scope="module")
def theirs(ours):
    """transformers' own class over the same weights, configured by hand rather than through our config builders."""
    spec = ours.spec
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "eos_token_id": spec.tokens.im_end,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4},
        image_token_id=spec.tokens.image_pad,
        vision_start_token_id=spec.tokens.vision_start,
        vision_end_token_id=spec.tokens.vision_end,
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    state = {}
    for name, value in ours.state_dict().items():
        state[name.replace("visual.", "model.visual.").replace("language.", "model.language_model.")] = value
    model.load_state_dict(state, strict=True)
    return model


def scene(spec, images: int):
    """Token ids of a prompt with `images` images, their patches and grids."""
    grids = GRIDS[images]
    tokens = spec.tokens
    generator = torch.Generator().manual_seed(images)
    ids = [tokens.im_start, 5, 6]
    for rows, columns in grids:
        ids += [tokens.vision_start, *[tokens.image_pad] * (rows * columns // 4), tokens.vision_end]
    ids += [*torch.randint(0, 256, (9,), generator=generator).tolist(), tokens.im_end, tokens.im_start, 7]
    patches = torch.randn(sum(rows * columns for rows, columns in grids), 1176, generator=generator)
    return torch.tensor(ids), patches, grids


def their_inputs(spec, ids, patches, grids):
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, rows, columns] for rows, columns in grids]),
        "mm_token_type_ids": (ids == spec.tokens.image_pad).int()[None],
    }


@pytest.mark.parametrize("images", [1, 3])
def test_logits_and_every_hidden_state_agree_with_transformers(ours, theirs, images):
    ids, patches, grids = scene(ours.spec, images)
    expected = theirs(**their_inputs(ours.spec, ids, patches, grids), output_hidden_states=True)

    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in ours.language.layers]
    positions, _ = mrope_positions(ids, grids, ours.spec.tokens.image_pad)
    embedded = ours.embed(ids, ours.images(patches, grids))
    final = ours.hidden(embedded, positions, DynamicCache(config=ours.language.config))
    for hook in hooks:
        hook.remove()

    torch.testing.assert_close(embedded[None], expected.hidden_states[0], rtol=0, atol=1e-6)
    # transformers lists the embeddings, each layer's output but the last, and the final norm.
    for layer, state in enumerate(seen[:-1]):
        torch.testing.assert_close(state, expected.hidden_states[layer + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final[None], expected.hidden_states[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(final)[None], expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 3])
def test_twenty_greedy_tokens_are_identical(ours, theirs, images):
    ids, patches, grids = scene(ours.spec, images)
    expected = theirs.generate(
        **their_inputs(ours.spec, ids, patches, grids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=ours.spec.tokens.im_end,
        pad_token_id=ours.spec.tokens.im_end,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    generation = ours.generate(ids, ours.images(patches, grids), grids, max_tokens=20)
    assert generation.token_ids == expected.sequences[0, len(ids) :].tolist()
    assert len(generation.token_ids) == 20
    assert len(generation.decoded) == 19
    torch.testing.assert_close(generation.prompt, expected.hidden_states[0][-1][0], rtol=1e-5, atol=1e-5)
    decoded = torch.cat([states[-1][0] for states in expected.hidden_states[1:]])
    torch.testing.assert_close(generation.decoded, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 3])
def test_mrope_positions_are_transformers_own(ours, theirs, images):
    ids, _, grids = scene(ours.spec, images)
    grid = torch.tensor([[1, rows, columns] for rows, columns in grids])
    expected, delta = theirs.model.get_rope_index(
        ids[None], (ids == ours.spec.tokens.image_pad).int()[None], image_grid_thw=grid
    )
    positions, following = mrope_positions(ids, grids, ours.spec.tokens.image_pad)
    assert torch.equal(positions, expected[:, 0])
    assert following == len(ids) + int(delta)


def test_a_320x240_image_takes_eleven_positions():
    ids = torch.tensor([1, *[9] * 99, 2])
    positions, following = mrope_positions(ids, [(18, 22)], image_pad=9)
    assert positions[:, 0].tolist() == [0, 0, 0]
    assert positions[:, -1].tolist() == [12, 12, 12]
    assert following == 13


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 9, 9, 9, 2], "too few image tokens"), ([1, 9, 9, 9, 9, 9, 2], "beyond those of the 1 images")],
)
def test_image_tokens_that_do_not_fit_the_grid_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(torch.tensor(ids), [(4, 4)], image_pad=9)


def test_generation_stops_at_the_end_token_only_and_does_not_feed_it_back(ours):
    ids, patches, grids = scene(ours.spec, 1)
    free = ours.generate(ids, ours.images(patches, grids), grids, max_tokens=20)
    first = free.token_ids[0]
    spec = ours.spec.model_copy(update={"tokens": ours.spec.tokens.model_copy(update={"im_end": first})})
    ours_spec, ours.spec = ours.spec, spec
    try:
        stopped = ours.generate(ids, ours.images(patches, grids), grids, max_tokens=20)
    finally:
        ours.spec = ours_spec
    assert stopped.token_ids == [first]
    assert len(stopped.decoded) == 0
