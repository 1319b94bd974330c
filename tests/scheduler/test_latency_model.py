import math
import random

import pytest

from flexllm_vllm.scheduler.latency_model import IterationWork, LatencyModel


def machine(work: IterationWork, speed: float = 1.0) -> float:
    """Milliseconds on a made-up machine."""
    ms = 25 + 1.5 * work.decode_rows + 0.8 * work.decode_context + 1.1 * work.prefill_tokens
    ms += 6 * work.has_finetuning_rows + 1.2 * work.forward_tokens
    return speed * (ms + 2.4 * work.backward_tokens + 15 * work.optimizer_steps)


def some_work(rng: random.Random) -> IterationWork:
    forward = rng.choice((0, 0, 16, 40, 100))
    return IterationWork(
        decode_rows=rng.randint(0, 8),
        decode_context=rng.random() * 8,
        prefill_tokens=rng.choice((0, 0, 0, 64, 300)),
        has_finetuning_rows=float(forward > 0),
        forward_tokens=forward,
        backward_tokens=rng.choice((0, 5.5, 30, 80)),
        optimizer_steps=float(rng.random() < 0.05),
    )


def learn(model: LatencyModel, rng: random.Random, count: int, speed: float = 1.0) -> None:
    for _ in range(count):
        work = some_work(rng)
        noise = rng.lognormvariate(0, 0.05) * (8 if rng.random() < 0.01 else 1)
        model.observe(work, machine(work, speed) * noise)


def error(model: LatencyModel, rng: random.Random, speed: float = 1.0) -> float:
    """Mean relative error on work that it has not seen."""
    works = [some_work(rng) for _ in range(200)]
    return sum(
        abs(model.predict_ms(w) - machine(w, speed)) / machine(w, speed) for w in works
    ) / len(works)


def test_it_learns_a_machine_in_spite_of_noise_and_outliers() -> None:
    model, rng = LatencyModel(), random.Random(0)
    learn(model, rng, 200)
    assert error(model, rng) < 0.08
    learn(model, rng, 800)
    assert error(model, rng) < 0.05
    assert model.mape < 0.2


def test_it_follows_a_machine_that_slows_down() -> None:
    model, rng = LatencyModel(), random.Random(1)
    learn(model, rng, 600)
    learn(model, rng, 400, speed=1.6)
    assert error(model, rng, speed=1.6) < 0.1


def test_an_hour_of_decoding_does_not_spoil_what_it_knows_of_finetuning() -> None:
    model, rng = LatencyModel(), random.Random(2)
    learn(model, rng, 600)
    for _ in range(50_000):
        work = IterationWork(decode_rows=2, decode_context=1.0)
        model.observe(work, machine(work) * rng.lognormvariate(0, 0.05))
    mixed = IterationWork(
        decode_rows=2, decode_context=1.0, has_finetuning_rows=1, forward_tokens=40,
        backward_tokens=30,
    )  # fmt: skip
    assert model.predict_ms(mixed) == pytest.approx(machine(mixed), rel=0.15)


def test_a_fixed_cost_that_the_calibration_could_not_tell_is_corrected_by_the_traffic() -> None:
    """Two noisy iterations of a slow machine say 215 ms where it is 30."""
    model, rng = LatencyModel(), random.Random(3)
    decode = IterationWork(decode_rows=1)
    samples = [(decode, 67.0), (IterationWork(decode_rows=4), 75.0)] * 5
    for tokens, ms in ((128, 477.0), (226, 627.0)):
        samples.append((IterationWork(has_finetuning_rows=1, forward_tokens=tokens), ms))
    model.calibrate(samples)
    assert model.cost_ms("has_finetuning_rows") > 150
    for _ in range(200):
        tokens = rng.randint(1, 20)
        work = IterationWork(decode_rows=1, has_finetuning_rows=1, forward_tokens=tokens)
        model.observe(decode, 67 * rng.lognormvariate(0, 0.05))
        model.observe(work, (67 + 30 + 2.7 * tokens) * rng.lognormvariate(0, 0.05))
    assert 15 < model.cost_ms("has_finetuning_rows") < 45


def test_costs_are_never_negative() -> None:
    model = LatencyModel()
    for tokens in range(1, 60):  # the more, the faster: no machine, but it must be survived
        work = IterationWork(decode_rows=1, has_finetuning_rows=1, forward_tokens=tokens)
        model.observe(work, 100 / tokens)
    assert model.cost_ms("forward_tokens") >= 0
    assert model.predict_ms(IterationWork(decode_rows=1, forward_tokens=500)) >= 0


def roofline(work: IterationWork) -> float:
    """Milliseconds on a machine that reads its weights in the time that it computes 32 rows."""
    return (
        2
        + max(30.0, 30.0 / 32 * work.rows)
        + 3 * work.has_finetuning_rows
        + 2 * (work.backward_tokens)
    )


def test_the_calibration_finds_the_knee_of_a_roofline() -> None:
    model = LatencyModel()
    samples = []
    for decode in (0.0, 1.0, 4.0):
        for forward in (0.0, 4.0, 16.0, 32.0, 64.0, 128.0):
            work = IterationWork(
                decode_rows=decode,
                has_finetuning_rows=float(forward > 0),
                forward_tokens=forward,
                backward_tokens=8.0 if forward in (0.0, 16.0) else 0.0,
            )
            if work.rows:
                samples.append((work, roofline(work)))
    model.calibrate(samples)
    assert model.knee == 32
    for work, ms in samples:
        assert model.predict_ms(work) == pytest.approx(ms, rel=0.03)
    parts = model.parts_ms(samples[-1][0])
    assert sum(parts.values()) == pytest.approx(model.predict_ms(samples[-1][0]))


def test_a_machine_that_is_slow_for_some_iterations_in_a_row_needs_less_of_a_margin() -> None:
    def margin(correlation: float) -> float:
        model, rng = LatencyModel(), random.Random(4)
        slowness, spread = 0.0, 0.15
        for _ in range(3000):
            fresh = rng.gauss(0, spread * math.sqrt(1 - correlation**2))
            slowness = correlation * slowness + fresh
            work = some_work(rng)
            model.observe(work, machine(work) * math.exp(slowness))
        return model.margin

    assert margin(0.7) < margin(0.0) - 0.08


@pytest.mark.parametrize(("in_a_row", "least", "most"), [(5, 1.15, 1.5), (1, 1.0, 1.1)])
def test_slow_iterations_are_expected_to_go_on_where_they_usually_do(
    in_a_row: int, least: float, most: float
) -> None:
    model, rng = LatencyModel(), random.Random(5)
    learn(model, rng, 600)
    for _ in range(60):
        learn(model, rng, 20)
        before = model.pace
        for _ in range(in_a_row):
            work = some_work(rng)
            model.observe(work, 1.5 * machine(work))
    assert 0.9 < before < 1.1
    assert least < model.pace < most


def test_what_is_late_without_finetuning_does_not_raise_the_margin() -> None:
    """Of iterations beside prompts of other requests one in 20 is late, whatever is done."""
    margins = {}
    for finetuning in (0.0, 30.0):
        model, rng = LatencyModel(), random.Random(4)
        for index in range(3000):
            mixed = IterationWork(decode_rows=2, backward_tokens=30)
            model.observe(mixed, machine(mixed) * rng.lognormvariate(0, 0.1), 1000.0)
            if index % 20 == 0:
                late = IterationWork(decode_rows=2, prefill_tokens=64, backward_tokens=finetuning)
                model.observe(late, machine(late), 50.0)
        margins[finetuning] = model.margin
    assert margins[0.0] < margins[30.0]
