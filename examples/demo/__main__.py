"""`make demo`."""

import time
from pathlib import Path

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from examples.demo.load import BackgroundLoad
from examples.demo.progress import follow
from examples.demo.scoring import DATA, Answer, Score, ask
from examples.server import MODEL_NAME, ROOT, running

SHOWN = 4  # held-out questions in the table


def report_iterations(console: Console, url: str) -> None:
    """How inference and finetuning shared the engine's iterations."""
    response = httpx.get(f"{url}/v1/finetuning/iterations", params={"last": 8000}, timeout=30)
    iterations = response.json()["data"]
    forward = [i for i in iterations if i["finetuning_forward_tokens"]]
    both = [i for i in forward if i["decode_tokens"] or i["prefill_tokens"]]
    console.print(
        f"{len(iterations)} iterations; {len(forward)} held finetuning tokens in their forward, "
        f"{len(both)} of them beside inference tokens"
    )


def compare(console: Console, base: list[Answer], tuned: list[Answer]) -> bool:
    """Prints both models side by side; whether the adapter is better."""
    table = Table("held-out question", "base model", "trained adapter", show_lines=True)
    for before, after in list(zip(base, tuned, strict=True))[:SHOWN]:
        table.add_row(before.question, before.text.strip()[:160], after.text.strip())
    console.print(table)
    scores = Score.of(base), Score.of(tuned)
    for name, score in zip(("base model", "trained adapter"), scores, strict=True):
        console.print(
            f"{name:>15}: {score.well_formed:4.0%} JSON of the taught form, "
            f"{score.correct:4.0%} with every value right ({len(base)} held-out questions)"
        )
    return scores[1].well_formed > scores[0].well_formed


def main() -> int:
    console = Console()
    folder = ROOT / ".demo"
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    console.rule("vllm serve --enable-finetuning")
    log = folder / "server.log"
    with running(
        Path(folder / "finetuning"), log, lambda: console.status(f"starting, log in {log.name}")
    ) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        console.print(f"ready at {url}/v1 after {time.monotonic() - began:.0f} s")
        base = ask(client, MODEL_NAME)

        console.rule("a finetuning job, and a client that keeps asking")
        file = client.files.create(file=DATA / "train.jsonl", purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=MODEL_NAME,
            training_file=file.id,
            suffix="orders",
            seed=1,
            method={
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": 1, "batch_size": 8, "learning_rate": 2e-3},
                    "lora": {"r": 16},
                },
            },
        )
        with BackgroundLoad(client, MODEL_NAME) as load:
            job = follow(client, job.id, load, console)
        if job.fine_tuned_model is None or load.failures:
            console.print(f"the job {job.status}: {job.error}; {load.failures} requests failed")
            return 1
        console.print(f"served as {job.fine_tuned_model}, {job.trained_tokens} tokens trained")
        report_iterations(console, url)

        console.rule("before and after")
        better = compare(console, base, ask(client, job.fine_tuned_model))
    console.print(f"server stopped; {time.monotonic() - began:.0f} s in all")
    return 0 if better else 1


if __name__ == "__main__":
    raise SystemExit(main())
