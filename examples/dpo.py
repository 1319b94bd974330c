"""Preferences: DPO on pairs of a short and a long-winded answer.

python -m examples.dpo
"""

import json
from typing import Any

from examples.connection import ask, connect, follow, parser

CITIES = ("Oslo", "Lima", "Rome", "Cairo", "Quito", "Delhi", "Tokyo", "Accra")
QUESTIONS = ("What is a good month to visit {}?", "Is {} worth a visit?", "How do I reach {}?")


def pair(question: str) -> dict[str, Any]:
    """In OpenAI's preference format."""
    wordy = f"What a wonderful question! {question} There is so much that one could say here."
    return {
        "input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": "Ask our travel desk: 555-0100."}],
        "non_preferred_output": [{"role": "assistant", "content": wordy}],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--max-steps", type=int, default=-1, help="end after these; -1: do not")
    options.add_argument("--batch-size", type=int, default=4, help="pairs in a step")
    options.add_argument("--beta", type=float, default=0.1)
    args = options.parse_args()
    client, base = connect(args)

    pairs = [pair(question.format(city)) for city in CITIES for question in QUESTIONS]
    data = "\n".join(json.dumps(each) for each in pairs).encode()
    file = client.files.create(file=("preferences.jsonl", data), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="brief",
        method={
            "type": "dpo",
            "dpo": {
                "hyperparameters": {
                    "n_epochs": args.epochs,
                    "batch_size": args.batch_size,
                    "beta": args.beta,
                    "learning_rate": 5e-4,  # type: ignore[typeddict-unknown-key]
                    "max_steps": args.max_steps,
                }
            },
        },
    )
    job = follow(client, job)

    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    margins = [e.data["rewards/margins"] for e in events if e.type == "metrics" and e.data]  # type: ignore
    print(f"Reward margin, first and last step: {margins[-1]:.2f}, {margins[0]:.2f}")
    question = "What is a good month to visit Paris?"
    print(f"{base}: {ask(client, base, question)}")
    print(f"{job.fine_tuned_model}: {ask(client, job.fine_tuned_model, question)}")


if __name__ == "__main__":
    main()
