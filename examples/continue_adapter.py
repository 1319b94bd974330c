"""Continue an adapter: a job whose model is another job's result begins where that one ended.

python -m examples.continue_adapter
"""

import json
from pathlib import Path
from typing import Any

from openai import OpenAI

from examples.connection import connect, follow, parser

DATA = Path(__file__).parent / "data" / "train.jsonl"


def train(client: OpenAI, model: str, lines: list[str]) -> tuple[Any, list[float]]:
    """A job of one epoch on these lines, and the loss of each of its steps."""
    file = client.files.create(file=("part.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        suffix="orders",
        hyperparameters={
            "n_epochs": 1,
            "batch_size": 4,
            "learning_rate": 1e-3,  # type: ignore[typeddict-unknown-key]
        },
    )
    job = follow(client, job)
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    losses = [e.data["train_loss"] for e in reversed(events) if e.type == "metrics" and e.data]  # type: ignore
    return job, losses


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--examples", type=int, default=40, help="in each of the two files")
    args = options.parse_args()
    client, base = connect(args)
    lines = [json.dumps(json.loads(line)) for line in DATA.read_text().splitlines()]

    first, losses = train(client, base, lines[: args.examples])
    print(f"{first.fine_tuned_model}: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    second, more = train(client, first.fine_tuned_model, lines[args.examples : 2 * args.examples])
    print(f"{second.fine_tuned_model}: loss {more[0]:.2f} to {more[-1]:.2f}")
    print("Both are served, and each is an adapter of its own:")
    for model in client.models.list():
        print(f"  {model.id}")


if __name__ == "__main__":
    main()
