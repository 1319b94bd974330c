from collections.abc import Callable
from typing import Any

import httpx
import openai

Upload = Callable[..., str]


def test_the_legacy_form_drives_the_same_jobs(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    url = f"{server.url}/v1/fine_tunes"
    body = {"training_file": (file_id := upload()), "n_epochs": 2, "suffix": "old"}
    created = httpx.post(url, json=body).json()
    assert (created["object"], created["status"], created["model"]) == (
        "fine-tune",
        "pending",
        "demo",
    )
    assert created["hyperparams"]["n_epochs"] == 2
    assert created["training_files"][0]["id"] == file_id
    assert created["events"][0]["object"] == "fine-tune-event"
    assert client.fine_tuning.jobs.retrieve(created["id"]).status == "queued"

    server.store.succeed(created["id"], server.store.claim_next_job().adapter_path)
    done = httpx.get(f"{url}/{created['id']}").json()
    assert (done["status"], done["fine_tuned_model"][:12]) == ("succeeded", "ft:demo:loca")
    events = httpx.get(f"{url}/{created['id']}/events").json()
    assert events["object"] == "list"
    assert events["data"][0]["message"].startswith("Created")
    assert events["data"][-1]["message"] == "The job has successfully completed"

    client.files.delete(file_id)
    listed = httpx.get(url).json()["data"]
    assert [(job["id"], job["training_files"]) for job in listed] == [(created["id"], [])]
    assert "events" not in listed[0]


def test_a_legacy_job_is_cancelled(server: Any, upload: Upload) -> None:
    url = f"{server.url}/v1/fine_tunes"
    job_id = httpx.post(url, json={"training_file": upload()}).json()["id"]
    assert httpx.post(f"{url}/{job_id}/cancel").json()["status"] == "cancelled"


def test_legacy_errors_have_openais_form(server: Any, upload: Upload) -> None:
    url = f"{server.url}/v1/fine_tunes"
    file_id = upload()
    answers = {
        404: [
            httpx.get(f"{url}/ft-none"),
            httpx.post(url, json={"training_file": "file-none"}),
            httpx.post(url, json={"training_file": file_id, "model": "curie"}),
        ],
        400: [
            httpx.post(url, json={}),
            httpx.post(url, json={"training_file": file_id, "suffix": "a b"}),
            httpx.post(url, json={"training_file": file_id, "prompt_loss_weight": 0.1}),
        ],
    }
    for status, group in answers.items():
        for answer in group:
            assert answer.status_code == status, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
