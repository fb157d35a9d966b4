"""The health monitor: every trouble is named when it is there, once, and never when it is not."""

from __future__ import annotations

import math

import pytest

from tokenizer.health import Health, Thresholds

CODES = 200


def read_all(health, name, values, **others):
    """Feed one figure's values with constant others, 20 steps apart; what was said at each
    reading."""
    return [
        health.read(
            20 * index, {name: value, **{key.replace("__", "."): v for key, v in others.items()}}
        )
        for index, value in enumerate(values)
    ]


def only(said):
    """The single warning among the readings, and the reading that it came at."""
    ((reading, warning),) = [(index, line) for index, lines in enumerate(said) for line in lines]
    assert "\n" not in warning
    return reading, warning


def test_a_healthy_run_is_silent():
    health, said = Health((CODES,), adaptive_cap=1.0), []
    for index in range(200):
        figures = {
            "autoencoder.mse": 0.3 / (1 + index),
            "autoencoder.usage": min(1.0, 0.05 + 0.02 * index),  # fills up slowly
            "autoencoder.perplexity": min(150.0, 4 + 0.5 * index),
            "autoencoder.skipped": 0.0,
            "autoencoder.gradient_norm": 1.0,
            "discriminator.accuracy": 0.75 + 0.1 * math.sin(index),
        }
        if index >= 50:
            figures |= {
                "autoencoder.adversarial": 0.5 + 0.1 * math.sin(index),
                "autoencoder.adaptive_weight": 0.4,
            }
        said += health.read(20 * index, figures)
        if index % 10 == 0:
            said += health.read(
                20 * index, {"held_out.psnr": 20 + 0.02 * index - (0.5 if index > 50 else 0)}
            )
    assert said == []


def test_a_codebook_that_stays_small_is_called_collapsed():
    said = read_all(Health((CODES,)), "autoencoder.perplexity", [15, 9, 8, 5.1, 5, 5, 5])
    reading, warning = only(said)
    assert reading == 4  # the fifth: not before
    assert (
        "autoencoder.perplexity=5 stays below 20 (10% of 200 codes)" in warning
        and "quantizer.init=kmeans" in warning
    )


@pytest.mark.parametrize(
    "values", [[2, 4, 6, 8, 10, 12, 14, 17, 19.9, 22, 25], [5, 5, 5, 5], [150] * 9]
)
def test_a_codebook_that_fills_is_not(values):
    assert not any(read_all(Health((CODES,)), "autoencoder.perplexity", values))


def test_perplexity_is_judged_by_the_mean_codebook():
    assert any(read_all(Health((100, 700)), "autoencoder.perplexity", [30] * 5))
    assert not any(read_all(Health((100, 300)), "autoencoder.perplexity", [30] * 5))


def test_a_perplexity_that_falls_far_is_called_out():
    reading, warning = only(
        read_all(Health((CODES,)), "autoencoder.perplexity", [160, 150, 79, 78, 77, 76, 75, 74])
    )
    assert reading == 6 and "autoencoder.perplexity=75 fell below 80 (50% of its best)" in warning


@pytest.mark.parametrize("name", ["autoencoder.usage", "autoencoder.top_usage"])
def test_dead_codes(name):
    reading, warning = only(read_all(Health((CODES,)), name, [0.31] * 6))
    assert reading == 4 and f"{name}=31.0% of the codes stays below 50%" in warning
    assert "quantizer.restart=data" in warning
    assert not any(read_all(Health((CODES,)), name, [0.1, 0.2, 0.3, 0.4, 0.45, 0.6, 0.9]))


def test_a_discriminator_that_always_wins():
    health, said = Health((CODES,)), []
    for index in range(8):
        figures = {"discriminator.accuracy": 0.99, "autoencoder.adversarial": 1.0 + index}
        said.append(health.read(index, figures))
    reading, warning = only(said)
    assert reading == 4 and "discriminator.accuracy=99.0% stays above 95%" in warning
    assert "grows from 1 to 5" in warning and "discriminator_optimizer.lr" in warning


def test_a_discriminator_that_wins_in_warm_up_or_against_a_decoder_that_holds_is_left_alone():
    assert not any(read_all(Health((CODES,)), "discriminator.accuracy", [0.99] * 9))
    assert not any(
        read_all(
            Health((CODES,)), "discriminator.accuracy", [0.99] * 9, autoencoder__adversarial=1.5
        )
    )


def test_a_discriminator_that_cannot_tell():
    said = read_all(
        Health((CODES,)), "discriminator.accuracy", [0.51] * 6, autoencoder__adversarial=0.0
    )
    reading, warning = only(said)
    assert reading == 4 and "discriminator.accuracy=51.0% stays below 55%" in warning
    mixed = [0.51, 0.5, 0.52, 0.6, 0.51, 0.5, 0.53, 0.5]
    assert not any(
        read_all(Health((CODES,)), "discriminator.accuracy", mixed, autoencoder__adversarial=0.0)
    )


def test_an_adaptive_weight_at_its_cap():
    said = read_all(
        Health((CODES,), adaptive_cap=0.25), "autoencoder.adaptive_weight", [0.1] + [0.25] * 6
    )
    reading, warning = only(said)
    assert reading == 5 and "adaptive_weight=0.25 stays at its cap of 0.25" in warning
    assert "objective.adaptive_cap" in warning
    assert not any(
        read_all(Health((CODES,), adaptive_cap=1.0), "autoencoder.adaptive_weight", [0.25] * 9)
    )
    assert not any(read_all(Health((CODES,)), "autoencoder.adaptive_weight", [0.25] * 9))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_no_numbers_are_named_at_once(value):
    health = Health((CODES,))
    assert health.read(20, {"autoencoder.mse": 0.1, "autoencoder.perplexity": 9.0}) == []
    (warning,) = health.read(40, {"autoencoder.mse": value, "autoencoder.perplexity": 9.0})
    assert f"autoencoder.mse={value} is not finite" in warning and "loop.precision=fp32" in warning
    (both,) = Health((CODES,)).read(
        0, {"autoencoder.mse": value, "autoencoder.perplexity": math.nan}
    )
    assert f"autoencoder.mse={value} and 1 more are not finite" in both


@pytest.mark.parametrize(
    ("turn", "optimizer"), [("autoencoder", "optimizer"), ("discriminator", "discriminator_")]
)
def test_skipped_steps(turn, optimizer):
    said = read_all(Health((CODES,)), f"{turn}.skipped", [0.0, 0.05, 0.05])
    reading, warning = only(said)
    assert reading == 1 and f"{turn}.skipped=0.05" in warning and f"lower {optimizer}" in warning


def test_psnr_that_falls_under_the_adversary():
    health = Health((CODES,))
    assert health.read(0, {"held_out.psnr": 24.0}) == []
    assert health.read(20, {"autoencoder.adversarial": 0.3}) == []
    assert health.read(20, {"held_out.psnr": 23.1}) == []  # some of it is the price of sharpness
    (warning,) = health.read(40, {"held_out.psnr": 22.5})
    assert "held_out.psnr=22.50 dB is more than 1 dB below its best, 24.00 dB" in warning
    assert "objective.adversarial" in warning


def test_psnr_that_falls_without_an_adversary():
    reading, warning = only(
        read_all(Health((CODES,)), "held_out.psnr", [20, 24.0, 23.5, 22.9, 22.5])
    )
    assert reading == 3 and "optimizer.lr" in warning and "objective." not in warning
    strict = Health((CODES,), thresholds=Thresholds(psnr_drop=0.2))
    assert only(read_all(strict, "held_out.psnr", [24.0, 23.9, 23.7]))[0] == 2


def test_a_trouble_is_said_once_until_it_clears_and_returns():
    health = Health((CODES,))
    said = read_all(health, "autoencoder.usage", [0.1] * 8 + [0.9] + [0.1] * 6)
    assert [index for index, lines in enumerate(said) if lines] == [4, 13]


def test_held_out_figures_in_between_change_nothing():
    """They are logged on lines of their own."""
    health, said = Health((CODES,)), []
    for step in range(8):
        said.append(health.read(step, {"autoencoder.usage": 0.1, "autoencoder.mse": math.nan}))
        assert health.read(step, {"held_out.psnr": 20.0}) == []
    assert [len(lines) for lines in said] == [1, 0, 0, 0, 1, 0, 0, 0]


def test_what_is_said_follows_from_the_readings():
    """A resumed run that is fed its kept lines says what an uninterrupted one would have said."""
    lines = [
        {"autoencoder.usage": 0.1, "autoencoder.perplexity": 5.0 - 0.1 * index}
        for index in range(9)
    ]
    straight = Health((CODES,))
    said = [straight.read(step, line) for step, line in enumerate(lines)]
    for stop in range(9):
        resumed = Health((CODES,))
        assert [resumed.read(step, line) for step, line in enumerate(lines[:stop])] == said[:stop]
        assert [resumed.read(step, line) for step, line in enumerate(lines[stop:], stop)] == said[
            stop:
        ]
