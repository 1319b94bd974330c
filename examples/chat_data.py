"""Chat data: system messages, several turns, answers without loss; and what a wrong line says.

python -m examples.chat_data
"""

import io
import json
from typing import Any

import openai

from examples.connection import ask, connect, follow, parser

SYSTEM = {"role": "system", "content": "You take orders for a furniture shop."}
ITEMS = ("lamps", "chairs", "clocks", "desks", "shelves", "rugs", "mirrors", "benches")


def conversation(item: str, quantity: int) -> dict[str, Any]:
    """A wrong answer that is only context (weight 0), and the one to be learnt."""
    return {
        "messages": [
            SYSTEM,
            {"role": "user", "content": f"I need {quantity} {item}."},
            {"role": "assistant", "content": "Sure!", "weight": 0},
            {"role": "user", "content": "Please confirm the order properly."},
            {"role": "assistant", "content": f"CONFIRMED: {quantity} x {item}", "weight": 1},
        ]
    }


def upload(client: openai.OpenAI, examples: list[dict[str, Any]]) -> str:
    """The id of a new file of these examples."""
    lines = "\n".join(json.dumps(example) for example in examples)
    file = ("orders.jsonl", io.BytesIO(lines.encode()))
    return client.files.create(file=file, purpose="fine-tune").id


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--max-steps", type=int, default=-1, help="end after these; -1: do not")
    args = options.parse_args()
    client, base = connect(args)

    wrong = conversation("lamps", 3)
    wrong["messages"][1]["role"] = "customer"
    try:
        upload(client, [conversation("rugs", 2), wrong])
    except openai.BadRequestError as error:
        print(f"A wrong line is refused at upload: {error.body['message']}")  # type: ignore

    examples = [conversation(item, quantity) for item in ITEMS for quantity in range(2, 7)]
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=upload(client, examples),
        suffix="chat",
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": args.epochs,
                    "batch_size": 8,
                    "learning_rate": 1e-3,  # type: ignore[typeddict-unknown-key]
                    "max_steps": args.max_steps,
                }
            },
        },
    )
    job = follow(client, job)
    *question, _answer = conversation("stools", 9)["messages"]
    for message in question:
        message.pop("weight", None)  # of training data only
    for model in (base, job.fine_tuned_model):
        print(f"{model}: {ask(client, model, *question)}")


if __name__ == "__main__":
    main()
