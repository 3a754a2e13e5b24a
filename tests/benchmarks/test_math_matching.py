"""The game's texts, expert, data, training and judge."""

import json

import numpy as np
import pytest

from chatvla_edge.benchmarks.math_matching import expert, texts
from chatvla_edge.drivers.sim.tabletop import SPLITS, Equation, Tabletop

torch = pytest.importorskip("torch")

from chatvla_edge.benchmarks.math_matching import (  # noqa: E402
    batched,
    closed_loop,
    data,
    evaluate,
    geometry,
    muon,
    train,
    trainer,
    variants,
)
from chatvla_edge.export.checkpoint.reader import open_checkpoint  # noqa: E402
from chatvla_edge.export.model import images  # noqa: E402
from chatvla_edge.export.model.backbone import mrope_positions  # noqa: E402
from chatvla_edge.export.model.policy import ChatVLA2  # noqa: E402

TRUTH = texts.Situation(Equation(3, "+", 5), (8, 2, 6), 0, None)


# ------------------------------------------------------------------------------------------------------------- texts


def test_the_template_word_for_word():
    assert texts.reasoning(TRUTH) == (
        "On the whiteboard is 3 + 5. 3 + 5=8. There are: 8 (left), 2 (middle), and 6 (right). "
        "I should pick 8 from left. Next Action:"
    )
    held = texts.Situation(Equation(7, "*", 1), (2, 7, 6), 1, 1)
    assert texts.reasoning(held) == (
        "On the whiteboard is 7 * 1. 7 * 1=7. Already picked 7 from middle. I should place it on the whiteboard. "
        "Next Action:"
    )


@pytest.mark.parametrize(
    ("said", "ocr", "math"),
    [
        ("3 + 5. 3 + 5=8. There are: 8 (left), 2 (middle), and 6 (right). I should pick 8 from left.", 4, 2),
        ("3 - 5. 3 - 5=8. There are: 8 (left), 2 (middle), and 6 (right). I should pick 8 from left.", 3, 2),
        ("3 + 6. 3 + 6=9. There are: 8 (left), 2 (middle), and 6 (right). I should pick 8 from left.", 3, 1),
        ("3 + 5. 3 + 5=8. There are: 8 (left), 2 (middle), and 5 (right). I should pick 2 from middle.", 3, 1),
        ("3 + 5. 3 + 5=8. There are:", 3, 1),
    ],
)
def test_a_text_is_scored_as_the_paper_scores(said, ocr, math):
    score = texts.score(f"On the whiteboard is {said} Next Action:", TRUTH)
    assert (score.ocr, score.math) == (ocr, math)


def test_noise_scores_nothing():
    assert texts.score("0. 0. Next Action: 0", TRUTH) == texts.Score(0, 0, False, None)


# ------------------------------------------------------------------------------------------------------------ expert


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_chunk_from_half_way_continues_the_chunk_that_led_there(seed):
    world = Tabletop()
    world.reset(seed, start_noise=0.0)
    aim = expert.goal(world)
    whole = expert.chunk(world.state, aim)
    later = expert.chunk(whole[20], aim)
    # Shares of the way are looked up in a table: a joint is within a few milliradian, a gripper within a millimetre.
    assert np.abs(later[:30] - whole[20:]).max() < 6e-3


def test_commands_start_where_the_arm_is_and_stay_smooth():
    for seed in range(30):
        world = expert.example(seed, "in_domain", 9)
        commands = expert.chunk(world.state, expert.goal(world))
        assert np.abs(commands[0] - world.state).max() < 1e-6
        assert np.abs(np.diff(commands, axis=0)).max() < 0.08  # 4 rad/s


class _Expert:
    """The expert as a player; it looks into the world instead of at the picture."""

    name, first_step, dt = "expert", 0, 0.02

    def __init__(self, worlds):
        self.worlds = worlds

    def query(self, frame, state, seed, draft):
        world = self.worlds[-1]
        commands = expert.chunk(state, expert.goal(world)).astype(np.float32)
        held = next((held for held in world.held if held is not None), None)
        text = texts.reasoning(texts.situation(world.scene, held))
        return closed_loop.Said(text, [1], commands, np.zeros((4, 8), np.int64), 1, 0)


def test_the_expert_wins_through_the_servo_plane(monkeypatch):
    worlds = []
    made = Tabletop.__post_init__
    monkeypatch.setattr(Tabletop, "__post_init__", lambda self: (made(self), worlds.append(self))[0])
    outcomes = [
        closed_loop.play(_Expert(worlds), seed, split, highest=9, size=(120, 160)) for seed, split in enumerate(SPLITS)
    ]
    assert all(outcome.success for outcome in outcomes)
    assert all(outcome.score == texts.Score(4, 2, True, outcome.truth.place) for outcome in outcomes)
    trial = evaluate.Trial.of(outcomes[0])
    assert trial.success
    assert trial.queries == len(outcomes[0].answers) > 5


# ------------------------------------------------------------------------------------------------ batches, optimizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ChatVLA2(geometry.spec(geometry.tokenizer())).eval()


@torch.no_grad()
def test_batched_vision_is_the_reference_row_by_row(model):
    frames = np.random.default_rng(0).integers(0, 256, (2, 112, 168, 3), dtype=np.uint8)
    rotary = batched.vision_rotary(model.backbone, 8, 12)
    found = batched.images(model.backbone, batched.patches(torch.from_numpy(frames)), rotary)
    for row, frame in zip(found, frames, strict=True):
        expected = model.backbone.images(torch.from_numpy(images.patches(frame)[0]), [(8, 12)])
        assert torch.allclose(row, expected, atol=1e-5)


@torch.no_grad()
def test_batched_language_is_the_reference_row_by_row(model):
    tokens = model.spec.tokens
    ids = torch.tensor([5, 6, tokens.vision_start, *[tokens.image_pad] * 24, tokens.vision_end, 7, 8, 9, 10])
    positions, _ = mrope_positions(ids, [(8, 12)], tokens.image_pad)
    seen = torch.randn(2, 24, model.spec.language.hidden)
    embedded = torch.stack([model.backbone.embed(ids, row) for row in seen])
    found = batched.hidden(model.backbone, embedded, batched.language_rotary(model.backbone, positions))
    for row, one in zip(found, embedded, strict=True):
        assert torch.allclose(row, model.backbone.hidden(one, positions), atol=2e-5)


def test_the_tokenizer_is_the_same_every_time_and_keeps_digits_apart():
    words = geometry.tokenizer()
    assert words == geometry.tokenizer()
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(words).encode(texts.reasoning(TRUTH))
    assert Tokenizer.from_str(words).decode(encoded.ids) == texts.reasoning(TRUTH)
    assert 40 <= len(encoded.ids) <= 55
    assert [token for token in encoded.tokens if token.isdigit()] == list("353588268")


@pytest.mark.parametrize("shape", [(3, 40, 64), (2, 64, 40)])
def test_muon_makes_updates_nearly_orthogonal(shape):
    values = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.4
    assert values.min() > 0.3


# ---------------------------------------------------------------------------------------------------------- training


class _Line:
    """Fits a line: a step for the loop alone."""

    name, rate, other_rate, constant, average = "line", 0.02, 0.05, 0.5, 0.9

    def __init__(self):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)

    def parameters(self):
        return dict(self.layer.named_parameters())

    def loss(self, rng):
        x = torch.from_numpy(rng.standard_normal((16, 1)).astype(np.float32))
        loss = ((self.layer(x) - 2 * x - 1) ** 2).mean()
        return loss, {"loss": float(loss.detach())}

    def judge(self):
        return {"slope": float(self.layer.weight.detach())}


class _KilledError(Exception):
    pass


class _Dying(_Line):
    """Dies after so many batches."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def loss(self, rng):
        self.left -= 1
        if self.left < 0:
            raise _KilledError
        return super().loss(rng)


def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 10)
    log = trainer.Log(tmp_path / "log.jsonl")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    straight, again = _Line(), _Line()
    trainer.run(straight, 40, whole, log, 1000)
    with pytest.raises(_KilledError):
        trainer.run(_Dying(25), 40, parts, log, 1000)
    trainer.run(again, 40, parts, log, 1000)
    assert again.layer.weight.item() == straight.layer.weight.item() > 1
    assert again.layer.bias.item() == straight.layer.bias.item()


def test_moments_are_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    found = data.moments(tmp_path, 2, "held_out", 9)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = data.moments(tmp_path, 2, "held_out", 9)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert np.array_equal(found.frames, again.frames)
    assert found.frames.shape == (8, 112, 168, 3)
    assert found.actions.shape == (8, 50, 14)
    equation, numbers, place, _ = found.said(0)
    assert numbers[place] == equation.answer


def test_cells_find_the_image_token_that_looks_at_a_point():
    cell, offset = data.cells(np.array([[-0.4 + 0.8 / 12, 0.3 - 0.6 / 8], [0.39, -0.29]], np.float32))
    assert cell.tolist() == [0, 23]
    assert np.abs(offset[0]).max() < 1e-6


@pytest.mark.slow
def test_a_short_training_learns_and_writes_a_checkpoint_that_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 60)
    monkeypatch.setattr(trainer, "SAVE_EVERY", 5)
    short = ["--vision-steps=20", "--language-steps=5", "--head-steps=20", "--join-steps=5"]
    assert train.main([str(tmp_path), "--eager", "--shards=2", "--workers=1", *short, "--judge-every=1000"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for step in ("vision", "language", "head"):
        losses = [line["loss"] for line in lines if line["step"] == step and "loss" in line]
        assert losses[-1] < 0.9 * losses[0] if len(losses) > 1 else losses
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.spec == geometry.spec(geometry.tokenizer())


# ------------------------------------------------------------------------------------------------------------- judge


def _trial(seed, split, success, text="x"):
    return evaluate.Trial(seed, split, 4, 2, text, True, success, success, 3.0, 10, 400, 30, 390, 0.1, 0.1, [[1, 2]])


def test_pairs_are_compared_trial_by_trial():
    base = [_trial(seed, "in_domain", seed != 0) for seed in range(10)]
    other = [_trial(seed, "in_domain", seed not in (1, 2), "x" if seed else "y") for seed in range(10)]
    drop, error, lost, won = evaluate.paired_drop(base, other)
    assert (drop, lost, won) == (pytest.approx(0.1), 2, 1)
    assert 0 < error < 0.3
    assert evaluate.same_text(base, other) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no pairs"):
        evaluate.paired_drop(base, other[1:])


def test_an_interval_holds_its_rate_and_stays_within_0_and_1():
    low, high = evaluate.interval(20, 20)
    assert 0.8 < low < 1 == high
    low, high = evaluate.interval(10, 20)
    assert low < 0.5 < high


def test_a_report_says_which_gates_hold():
    base = [_trial(seed, split, True) for seed in range(5) for split in SPLITS]
    spoilt = [_trial(seed, split, False, "y") for seed in range(5) for split in SPLITS]
    found = evaluate.report({"fp32": base, "int8": base, "int4-row": spoilt, "top-1": spoilt, "experts int2": base})
    verdicts = {goal.name: goal.ok for goal in found.goals}
    assert verdicts["int8: success lost"]
    assert not verdicts["int4-row: success lost"]
    assert verdicts["top-1 fails the gates of int4 experts"]
    assert not verdicts["experts int2 fails the gates of int4 experts"]


def test_rounding_to_bits_keeps_what_the_bits_can_hold():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    errors = [float((variants._blocks(bits)(weight) - weight).abs().max()) for bits in (8, 4)]
    two = variants._two_bits(weight)
    assert errors[0] < 0.02 < errors[1] < 0.3
    assert all(len(block.unique()) <= 4 for block in two.unflatten(1, (-1, 32)).flatten(0, 1))


def test_rotated_routers_send_every_token_to_the_next_expert():
    router = torch.arange(8.0)[:, None].expand(8, 3)
    turned = variants._rotated({"a.router.weight": router, "a.routed.0.up_proj.weight": router})
    assert turned["a.router.weight"][1, 0] == 0
    assert turned["a.routed.0.up_proj.weight"] is router
