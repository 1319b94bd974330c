"""The page as a user sees it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from playwright.sync_api import Page, expect
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from tests.api.conftest import _run_server
from tests.web.web_site import PHONE, OpenPage, Site

Upload = Callable[..., str]
UNAUTHORIZED = ("401 (Unauthorized)",)
BAD_REQUEST = ("400 (Bad Request)",)


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file onto the page, as a file manager does."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name));
            return transfer;
        }""",
        [name, content],
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def tile(page: Page, label: str) -> str:
    """The value of a figure of the job that is shown."""
    found = page.locator(".job-tiles .tile").filter(has_text=label).locator(".value")
    return found.text_content() or ""


def test_an_empty_server_says_what_to_do(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.get_by_text("No jobs yet")).to_be_visible()
    expect(page.get_by_role("heading", name="Train your first adapter")).to_be_visible()
    expect(page.get_by_text("Waiting for the engine")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("Live")
    page.get_by_role("link", name="Library").click()
    expect(page.get_by_text("No finetuned models yet")).to_be_visible()
    expect(page.get_by_text("No files yet")).to_be_visible()


def test_a_dropped_file_becomes_a_job(site: Site, open_page: OpenPage, training_file: Path) -> None:
    page = open_page()
    drop(page, training_file.name, training_file.read_text())
    expect(page.locator("#file-state")).to_contain_text("every line is checked")
    page.get_by_label("Name").fill("orders")
    page.get_by_label("Epochs").fill("5")
    page.get_by_label("Learning rate").fill("1e-3")
    page.get_by_label("LoRA rank").fill("8")
    page.get_by_role("button", name="Start job").click()
    expect(page.locator(".job", has_text="orders")).to_contain_text("Queued")
    expect(page.get_by_role("heading", name="orders")).to_be_visible()
    job = site.server.store.list_jobs()[0][0]
    assert page.url.endswith(f"#/jobs/{job.id}")
    assert (job.suffix, job.training.n_epochs, job.training.learning_rate) == ("orders", 5, 1e-3)
    assert (job.model, job.lora.r) == ("demo", 8)
    assert site.server.store.files.get(job.training_file).filename == training_file.name


def test_what_the_server_refuses_is_said_at_its_field(
    site: Site, open_page: OpenPage, training_file: Path
) -> None:
    page = open_page(allowed=BAD_REQUEST)
    drop(page, "broken.jsonl", '{"messages": 3}\n')
    expect(page.locator("#file-error")).to_contain_text("Invalid file format. Line 1")
    expect(page.get_by_role("button", name="Start job")).to_be_disabled()
    page.locator("#file-input").set_input_files(training_file)
    expect(page.locator("#file-state")).to_contain_text("every line is checked")
    expect(page.locator("#file-error")).to_be_hidden()
    for label, field, value, message in (
        ("Name", "suffix", "a/b", "letter or digit"),
        ("Epochs", "n_epochs", "many", "'auto' or a positive integer"),
        ("Learning rate", "learning_rate", "-1", "greater than 0"),
        ("LoRA rank", "r", "4096", "server's maximum of 32"),
    ):
        page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Start job").click()
        expect(page.locator(f"#{field}-error")).to_contain_text(message)
        expect(page.get_by_label(label)).to_be_focused()
        expect(page.locator(".field-error:visible")).to_have_count(1)
        page.get_by_label(label).fill("")
    page.get_by_label("Method").select_option("dpo")
    page.get_by_role("button", name="Start job").click()
    expect(page.locator("#file-error")).to_contain_text("line 1: this example is for the method")
    assert site.server.store.list_jobs()[0] == []


def test_the_loss_of_a_running_job_grows_live(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    job_id = site.create_job(client, upload(), suffix="orders")
    job = site.server.store.claim_next_job()
    assert job is not None
    for step in range(1, 4):
        site.step(job_id, step, 100, 3.0 / step)
    page = open_page()  # a laptop shows the running job by itself
    line = page.locator(".train-average")
    expect(line).to_have_attribute("d", re.compile(r"^M[^L]+(L[^L]+){2}$"))
    assert tile(page, "Training loss") == "1.00"
    assert tile(page, "Speed") == "210"
    for step in range(4, 151):  # more than one page of events
        site.step(job_id, step, 200, 3.0 / step)
    site.server.store.record_evaluation(
        job_id, 150, {"valid_loss": 0.25, "valid_mean_token_accuracy": 0.9}
    )
    expect(page.get_by_text("step 150 of 200")).to_be_visible()
    expect(line).to_have_attribute("d", re.compile(r"^M[^L]+(L[^L]+){149}$"))
    expect(page.locator(".valid-dots circle")).to_have_count(1)
    assert tile(page, "Validation") == "0.250"
    expect(page.get_by_text("90% of tokens right")).to_be_visible()
    expect(page.locator(".job-line")).to_contain_text("150 / 200 · 210 tok/s")
    site.server.store.succeed(job_id, job.adapter_path)
    expect(page.locator(".detail .chip")).to_have_text("Succeeded")
    expect(page.get_by_text("Served as ft:demo:local:orders:")).to_be_visible()


def test_a_job_is_paused_resumed_and_cancelled(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    job_id = site.create_job(client, upload(), suffix="orders")
    store = site.server.store
    store.claim_next_job()
    site.step(job_id, 1, 10, 2.0)
    page = open_page()
    detail = page.locator(".detail")
    detail.get_by_role("button", name="Pause").click()
    expect(detail.get_by_role("button", name="Pausing …")).to_be_disabled()
    assert store.pause_requested_jobs() == {job_id}
    store.paused(job_id, 1)
    expect(detail.locator(".chip")).to_have_text("Paused")
    detail.get_by_role("button", name="Resume").click()
    expect(detail.locator(".chip")).to_have_text("Queued")
    store.claim_next_job()
    expect(detail.locator(".chip")).to_have_text("Running")
    detail.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Back").click()
    assert store.cancel_requested_jobs() == set()
    detail.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(detail.get_by_role("button", name="Cancelling …")).to_be_disabled()
    store.cancelled(job_id)
    expect(detail.locator(".chip")).to_have_text("Cancelled")
    expect(detail.locator(".detail-head button:visible")).to_have_count(0)


def test_events_checkpoints_and_settings_are_a_key_away(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage, tmp_path: Path
) -> None:
    job_id = site.create_job(client, upload(), suffix="orders", seed=77)
    site.server.store.claim_next_job()
    site.step(job_id, 1, 2, 2.0)
    site.server.store.record_checkpoint(job_id, 1, tmp_path, {"train_loss": 2.0})
    page = open_page()
    expect(page.locator(".events")).to_contain_text("Checkpoint created at step 1")
    page.get_by_role("tab", name="Events").focus()
    page.keyboard.press("ArrowRight")
    checkpoint = page.get_by_role("tabpanel").get_by_role("link", name="ckpt-step-1")
    expect(checkpoint).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel")).to_contain_text("77")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Events")).to_be_focused()


def test_a_server_without_checkpoints_breaks_nothing(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    routes = site.server.app.router.routes
    routes[:] = [r for r in routes if not getattr(r, "path", "").endswith("/checkpoints")]
    job_id = site.create_job(client, upload(), suffix="orders")
    site.server.store.claim_next_job()
    page = open_page(allowed=("404 (Not Found)",))
    page.get_by_role("tab", name="Checkpoints").click()
    expect(page.get_by_text("No checkpoints yet")).to_be_visible()
    site.step(job_id, 1, 10, 2.0)
    expect(page.get_by_text("step 1 of 10")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("Live")


def test_the_iterations_show_how_they_were_shared(site: Site, open_page: OpenPage) -> None:
    for i in range(20):
        held = {"finetuning_forward_tokens": 0, "finetuning_backward_tokens": 300}
        site.iterate(duration_ms=110.0 if i == 7 else 60.0, **(held if i % 2 else {}))
    page = open_page()
    engine = page.locator(".engine")
    expect(engine.locator(".tile").nth(0)).to_contain_text("95%")
    expect(engine.locator(".tile").nth(1)).to_contain_text("target 92 ms")
    for name in ("decode", "forward", "backward", "time-mixed", "time-over", "target"):
        expect(engine.locator(f"svg .{name}")).to_have_attribute("d", re.compile("M"))
    before = engine.locator("svg .decode").get_attribute("d")
    site.iterate(duration_ms=40.0, finetuning_forward_tokens=0)
    expect(engine.locator("svg .decode")).not_to_have_attribute("d", before or "")
    box = engine.locator("svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 60)
    expect(engine.locator(".reading")).to_contain_text("40 ms  ·  target 92 ms")
    page.mouse.move(0, 0)
    expect(engine.locator(".reading")).to_be_hidden()
    engine.locator("svg").focus()
    page.keyboard.press("ArrowLeft")  # the one before the last
    expect(engine.locator(".reading")).to_contain_text("60 ms  ·  target 92 ms")


def test_names_and_answers_are_text_and_never_markup(
    site: Site, client: openai.OpenAI, open_page: OpenPage, tmp_path: Path
) -> None:
    attack = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>"
    line = json.dumps({"prompt": "a", "completion": "b"}).encode()
    filename = attack.replace("</b>", ".jsonl")  # what comes before a slash is no part of a name
    file = client.files.create(file=(filename, line), purpose="fine-tune")
    job_id = site.create_job(client, file.id, metadata={attack: attack})
    store = site.server.store
    store.claim_next_job()
    store.add_event(job_id, "warn", attack)
    store.fail(job_id, "broken", attack)
    site.speaker.pieces = [attack]
    page = open_page(f"#/jobs/{job_id}")
    expect(page.locator(".detail .alert")).to_have_text(attack)
    expect(page.locator(".events")).to_contain_text(attack)
    page.get_by_role("tab", name="Settings").click()
    expect(page.locator(".settings")).to_contain_text(attack)
    page.get_by_role("link", name="Library").click()
    expect(page.locator(".library")).to_contain_text("<b>bold.jsonl")
    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Message to both models").fill(attack)
    page.keyboard.press("Enter")
    expect(page.locator(".answer-text").first).to_have_text(attack)
    expect(page.locator(".question")).to_have_text(attack)
    assert page.locator("main img, main b").count() == 0
    assert page.title() == "Finetuning"


def test_two_models_answer_side_by_side_until_stopped(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage, tmp_path: Path
) -> None:
    job_id = site.create_job(client, upload(), suffix="orders")
    site.server.store.claim_next_job()
    site.server.store.succeed(job_id, tmp_path)
    name = client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    page = open_page()
    page.locator(".detail").get_by_role("link", name="Chat").click()
    expect(page.get_by_label("Model A")).to_have_value("demo")
    expect(page.get_by_label("Model B")).to_have_value(name)
    site.speaker.hold.set()
    page.get_by_label("Message to both models").fill("Hi")
    page.get_by_role("button", name="Send").click()
    answers = page.locator(".answer-text")
    expect(answers).to_have_text(["Hello from ", "Hello from "])  # as it comes
    assert sorted(body["model"] for body in site.speaker.asked) == ["demo", name]
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer-note")).to_have_text(["Stopped", "Stopped"])
    page.wait_for_timeout(100)
    assert site.speaker.cut_off == 2
    site.speaker.hold.clear()
    page.get_by_label("Message to both models").fill("Again")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer-note").last).to_contain_text("3 tokens")
    assert [m["content"] for m in site.speaker.asked[-1]["messages"]] == [
        "Hi",
        "Hello from ",
        "Again",
    ]


def test_files_are_downloaded_deleted_and_used_again(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    file_id = upload()
    page = open_page("#/library")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    content = site.server.store.files.path(file_id).read_bytes()
    assert download.value.path().read_bytes() == content
    assert download.value.suggested_filename == "data.jsonl"
    page.get_by_role("button", name="New job").click()
    page.get_by_role("button", name="Start job").click()
    expect(page.get_by_role("heading", name=re.compile("Job "))).to_be_visible()
    job = site.server.store.list_jobs()[0][0]
    assert job.training_file == file_id
    client.fine_tuning.jobs.cancel(job.id)
    page.get_by_role("link", name="Library").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No files yet")).to_be_visible()
    assert site.server.store.files.page()[0] == []


def test_a_server_that_cannot_delete_models_says_so(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage, tmp_path: Path
) -> None:
    routes = site.server.app.router.routes
    routes[:] = [r for r in routes if not getattr(r, "path", "").startswith("/v1/models/")]
    job_id = site.create_job(client, upload(), suffix="orders")
    site.server.store.claim_next_job()
    site.server.store.succeed(job_id, tmp_path)
    page = open_page("#/library", allowed=("404 (Not Found)",))
    models = page.get_by_role("region", name="Finetuned models")
    models.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("does not offer to delete models")).to_be_visible()
    expect(models).to_contain_text("ft:demo:local:orders:")


def test_the_key_is_asked_for_and_kept_in_the_tab(
    site: Site,
    client: openai.OpenAI,
    upload: Upload,
    serve: Callable[[FastAPI], str],
    open_page: OpenPage,
) -> None:
    site.create_job(client, upload(), suffix="orders")
    guarded = FastAPI()
    guarded.add_middleware(AuthenticationMiddleware, tokens=["sesame"])
    guarded.mount("/", site.server.app)
    url = serve(guarded)
    page = open_page(url=f"{url}/finetuning", allowed=UNAUTHORIZED)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Continue").click()
    expect(dialog).to_contain_text("does not accept this key")
    dialog.get_by_label("Key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator(".job", has_text="orders")).to_be_visible()
    page.reload()
    expect(page.locator(".job", has_text="orders")).to_be_visible()
    expect(dialog).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()


def test_the_page_works_below_a_root_path(
    site: Site,
    client: openai.OpenAI,
    upload: Upload,
    serve: Callable[[FastAPI], str],
    open_page: OpenPage,
) -> None:
    site.create_job(client, upload(), suffix="orders")
    outer = FastAPI()
    outer.mount("/team/llm", site.server.app)
    url = serve(outer)
    page = open_page(url=f"{url}/team/llm/finetuning")
    expect(page.locator(".job", has_text="orders")).to_be_visible()
    page = open_page("/", url=f"{url}/team/llm/finetuning")
    expect(page.locator(".job", has_text="orders")).to_be_visible()
    assert page.url == f"{url}/team/llm/finetuning"


def test_a_server_that_is_away_is_waited_for(site: Site, open_page: OpenPage) -> None:
    running, thread, url = _run_server(site.server.app)
    page = open_page(url=f"{url}/finetuning", allowed=("ERR_CONNECTION_REFUSED", "ERR_EMPTY"))
    expect(page.locator("#connection")).to_have_text("Live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    running.should_exit = True
    thread.join(timeout=10)
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    asked.clear()
    page.wait_for_timeout(5000)
    assert 1 <= len(asked) <= 3  # after 1.5, 3, 6 s
    expect(page.locator("#connection")).to_have_text("Away")


def test_nothing_is_asked_while_the_page_is_hidden(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.locator("#connection")).to_have_text("Live")
    hide = """(state) => {
        Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, "hidden")
    page.wait_for_timeout(100)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2200)
    assert asked == []
    with page.expect_request("**/v1/models", timeout=1000):
        page.evaluate(hide, "visible")


def test_the_keyboard_is_enough(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    for suffix in ("first", "second"):
        site.create_job(client, upload(), suffix=suffix)
    page = open_page()
    expect(page.get_by_role("heading", name="second")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_role("button", name="New job").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="first")).to_be_visible()
    expect(page.locator(".job", has_text="first")).to_be_focused()
    page.wait_for_timeout(1700)  # it stays so when the list is read again
    expect(page.locator(".job", has_text="first")).to_be_focused()
    page.get_by_role("button", name="New job").press("Enter")
    expect(page.get_by_role("dialog", name="New job")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New job")).to_be_focused()


@pytest.mark.parametrize("view", ["#/jobs", "#/jobs/{job}", "#/chat", "#/library"])
def test_a_phone_never_scrolls_sideways(
    view: str,
    site: Site,
    client: openai.OpenAI,
    upload: Upload,
    open_page: OpenPage,
    tmp_path: Path,
) -> None:
    job_id = site.create_job(client, upload(), suffix="a-very-long-suffix-" + "x" * 45)
    site.server.store.claim_next_job()
    site.step(job_id, 1, 10, 2.0)
    site.iterate()
    site.server.store.succeed(job_id, tmp_path)
    page = open_page(view.format(job=job_id), PHONE, is_mobile=True, has_touch=True)
    expect(page.locator("#connection")).to_have_text("Live")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    if view == "#/jobs":
        page.locator(".job").tap()
        expect(page.get_by_role("link", name="All jobs")).to_be_visible()
        expect(page.locator(".list-card")).to_be_hidden()


def test_nothing_jumps_while_a_job_goes_on(
    site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    job_id = site.create_job(client, upload(), suffix="orders")
    site.server.store.claim_next_job()
    page = open_page()
    expect(page.get_by_role("heading", name="orders")).to_be_visible()
    page.evaluate(
        """() => {
            window.jumps = [];
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) window.jumps.push(entry.value);
            }).observe({ type: "layout-shift" });
        }"""
    )
    for step in range(1, 4):
        site.step(job_id, step, 10, 2.0)
        site.iterate()
        expect(page.get_by_text(f"step {step} of 10")).to_be_visible()
    assert page.evaluate("jumps.reduce((sum, jump) => sum + jump, 0)") < 0.005


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(
    theme: str, site: Site, client: openai.OpenAI, upload: Upload, open_page: OpenPage
) -> None:
    for status in ("running", "failed", "queued"):
        job_id = site.create_job(client, upload(), suffix=status)
        if status != "queued":
            site.server.store.claim_next_job()
            site.step(job_id, 1, 10, 2.0)
        if status == "failed":
            site.server.store.fail(job_id, "broken", "It broke")
    page = open_page(f"#/jobs/{job_id}", color_scheme=theme)
    expect(page.locator(".job")).to_have_count(3)
    expect(page.locator(".detail .chip")).to_be_visible()
    low_contrast = (Path(__file__).parent / "contrast.js").read_text()
    assert page.evaluate(low_contrast) == []
    page.get_by_role("button", name="New job").click()
    assert page.evaluate(low_contrast) == []
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Library").click()
    expect(page.get_by_text("data.jsonl").first).to_be_visible()
    assert page.evaluate(low_contrast) == []
    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Message to both models").fill("Hi")
    page.keyboard.press("Enter")
    expect(page.locator(".answer-note").last).to_contain_text("3 tokens")
    assert page.evaluate(low_contrast) == []


def test_the_shell_is_strict_and_holds_no_data(site: Site) -> None:
    answer = httpx.get(site.url)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert not re.search(r"""(src|href)="(/|https?:)""", answer.text)
    again = httpx.get(site.url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "..%2fapi%2fweb.py", "%2e%2e/plugin.py", "index"])
def test_nothing_else_is_served(site: Site, name: str) -> None:
    assert httpx.get(f"{site.url}/assets/{name}").status_code == 404
