"""Pictures of the page for the documentation: ``python -m pytest tests/web/screenshots.py``.

The suite does not collect this file. Jobs and iterations are sample data, in the shape of a real
run on two CPU cores. With ``SCREENSHOTS=folder`` all views are drawn, there, to look at.
"""

import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from sqlalchemy import update

from flexllm_vllm.jobs import schema
from tests.web.web_site import LAPTOP, PHONE, OpenPage, Site

ROOT = Path(__file__).parents[2]
PICTURES = {("laptop", "light"): "web-laptop.png", ("phone", "dark"): "web-phone.png"}
TOTAL = 120
ANSWER = "Order 1042 left our warehouse on Tuesday; the carrier expects to deliver it on Friday."


@pytest.fixture
def served_name() -> str:
    return "SmolLM2-135M-Instruct"


def set_times(site: Site, job_id: str, **minutes_ago: float) -> None:
    """Put times of a job (``created_at``, ``started_at``, ``finished_at``) into the past."""
    times = {name: int(time.time() - minutes * 60) for name, minutes in minutes_ago.items()}
    with site.server.store._database.write() as connection:
        job = schema.jobs.c.id == job_id
        connection.execute(update(schema.jobs).where(job).values(**times))
        events = schema.events.c.job_id == job_id
        moment = {"created_at": times.get("finished_at", times["created_at"])}
        connection.execute(update(schema.events).where(events).values(**moment))


def finished_jobs(site: Site, client: openai.OpenAI, file_id: str, chance: random.Random) -> str:
    """One that has succeeded, one that failed, one that is paused; the id of the first."""
    store = site.server.store
    done = site.create_job(client, file_id, suffix="support-v1", hyperparameters={"n_epochs": 30})
    job = store.claim_next_job()
    assert job is not None
    for step in range(1, 61):
        site.step(done, step, 60, 0.4 + 2.1 * math.exp(-step / 14) + chance.gauss(0, 0.05))
    store.succeed(done, job.adapter_path)
    set_times(site, done, created_at=200, finished_at=187.4)
    failed = site.create_job(client, file_id, suffix="long-documents")
    store.claim_next_job()
    store.fail(failed, "activation_cache", "An example is longer than the activation cache")
    set_times(site, failed, created_at=62, finished_at=61)
    paused = site.create_job(client, file_id, suffix="sql-style", hyperparameters={"n_epochs": 40})
    store.claim_next_job()
    site.step(paused, 31, 80, 0.9)
    store.paused(paused, 31)
    set_times(site, paused, created_at=41)
    return done


def running_job(site: Site, client: openai.OpenAI, file_id: str, chance: random.Random) -> str:
    store = site.server.store
    running = site.create_job(client, file_id, suffix="orders", hyperparameters={"n_epochs": 60})
    job = store.claim_next_job()
    assert job is not None
    for step in range(1, 79):
        loss = 0.31 + 2.4 * math.exp(-step / 17) + chance.gauss(0, 0.07) * (1 + 2 / step)
        rate = 1e-3 * min(1, step / 6) * (1 - step / TOTAL)
        speed = chance.gauss(106, 7)
        site.step(running, step, TOTAL, loss, learning_rate=rate, tokens_per_second=speed)
        if step % 12 == 0:
            metrics = {
                "valid_loss": 0.42 + 2.3 * math.exp(-step / 16),
                "valid_mean_token_accuracy": 0.55 + 0.4 * (1 - math.exp(-step / 25)),
            }
            store.record_evaluation(running, step, metrics)
        if step % 24 == 0:
            metrics |= {"train_loss": loss}
            store.record_checkpoint(running, step, job.adapter_path, metrics)
    set_times(site, running, created_at=9.5, started_at=9.4)
    site.create_job(client, file_id, suffix="translate-nl")
    return running


def add_iterations(site: Site) -> None:
    """Requests come and go beside a job."""
    chance = random.Random(3)
    begin = time.time() - 22
    for i in range(240):
        busy = 40 < i < 190
        requests = 1 + (i // 25) % 4 if busy else 0
        prefill = chance.choice((30, 42, 60)) if busy and chance.random() < 0.06 else 0
        forward = layers = 0
        if i % 2:
            layers = (260 - 24 * requests if busy else 900) + chance.randint(-30, 30)
        elif prefill:
            forward = 4
        else:
            forward = (24 - 3 * requests if busy else 64) + chance.randint(-3, 3)
        target = 92.0 if busy else 180.0
        cost = 34 + 3 * requests + prefill * 0.4 + forward * 2 + layers * 0.16
        late = chance.random() > 0.97
        duration = (target * 1.15 if late else min(cost, target * 0.97)) - chance.random() * 9
        site.iterate(
            start_time=begin,
            duration_ms=duration,
            target_ms=target,
            predicted_ms=duration * chance.gauss(1, 0.05),
            decode_tokens=requests,
            prefill_tokens=prefill,
            finetuning_forward_tokens=forward,
            finetuning_backward_tokens=layers,
            finetuning_loss_tokens=0,
        )
        begin += duration / 1000


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", ["laptop", "phone"])
def test_pictures(
    theme: str,
    device: str,
    site: Site,
    client: openai.OpenAI,
    upload: Callable[..., str],
    open_page: OpenPage,
) -> None:
    chance = random.Random(7)
    done = finished_jobs(site, client, upload(), chance)
    running = running_job(site, client, upload(), chance)
    model = client.fine_tuning.jobs.retrieve(done).fine_tuned_model
    add_iterations(site)
    laptop = device == "laptop"
    options = (
        {"device_scale_factor": 1} if laptop else {"device_scale_factor": 2, "has_touch": True}
    )
    size = LAPTOP if laptop else PHONE
    page = open_page(f"#/jobs/{running}", size, color_scheme=theme, is_mobile=not laptop, **options)
    page.get_by_text("step 78 of 120").wait_for()
    page.wait_for_timeout(900)
    folder = os.environ.get("SCREENSHOTS")
    if folder is None:
        if (device, theme) in PICTURES:
            (ROOT / "docs" / "images").mkdir(exist_ok=True)
            page.screenshot(path=ROOT / "docs" / "images" / PICTURES[device, theme])
        return

    def picture(name: str, **options: bool) -> None:
        page.wait_for_timeout(600)
        page.screenshot(path=Path(folder) / f"web-{device}-{theme}-{name}.png", **options)

    picture("job")
    picture("job-full", full_page=True)
    page.goto(f"{site.url}#/jobs")
    picture("list", full_page=True)
    page.goto(f"{site.url}#/library")
    picture("library")
    page.goto(f"{site.url}#/chat/{model}")
    page.wait_for_timeout(600)
    site.speaker.pieces = [f"{word} " for word in ANSWER.split()]
    page.get_by_label("Message to both models").fill("Where is my order 1042?")
    page.get_by_role("button", name="Send").click()
    picture("chat")
    page.goto(f"{site.url}#/jobs/{done}")
    page.get_by_role("tab", name="Settings").click()
    picture("done")
    if not laptop:
        page.goto(f"{site.url}#/jobs")
    page.get_by_role("button", name="New job").click()
    picture("new")
