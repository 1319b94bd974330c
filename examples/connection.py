"""What the example programs share: where the server is, how a job is followed, a question asked."""

import argparse
import os
import time
from typing import Any

from openai import OpenAI

ENDED = ("succeeded", "failed", "cancelled")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the two options that every example has; their defaults come from the environment."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--base-url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
    )
    options.add_argument("--api-key", default=os.environ.get("API_KEY", "none"))
    return options


def connect(args: argparse.Namespace) -> tuple[OpenAI, str]:
    """The stock client, and the name of the base model that the server serves."""
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    base = next(m.id for m in client.models.list() if not m.id.startswith("ft:"))
    return client, base


def follow(client: OpenAI, job: Any) -> Any:
    """The job as it has ended; prints its events as they come. Exits if it did not succeed."""
    seen: set[str] = set()
    while True:
        ended = client.fine_tuning.jobs.retrieve(job.id)  # before its events: none is missed
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        for event in reversed(events):
            if event.id not in seen:
                print(f"  {event.message}")
                seen.add(event.id)
        if ended.status in ENDED:
            break
        time.sleep(1)
    if ended.status != "succeeded":
        raise SystemExit(f"{ended.status}: {ended.error}")
    return ended


def ask(client: OpenAI, model: str, *messages: Any) -> str:
    """The model's answer, without chance; texts are the user's."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": m} if isinstance(m, str) else m for m in messages],
        temperature=0,
        max_tokens=48,
    )
    return answer.choices[0].message.content or ""
