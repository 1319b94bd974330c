"""Two organizations on one server: each has its files, jobs and adapters, and sees no others.

python -m examples.tenants.two_tenants --keys sk-of-acme sk-of-globex   # see make_keys.py
"""

from pathlib import Path

import openai
from openai import OpenAI

from examples.connection import ask, follow, parser

LINES = (Path(__file__).parents[1] / "data" / "train.jsonl").read_bytes().splitlines()
QUESTION = "Mia orders 12 lamps to Oslo."


def train(client: OpenAI, lines: list[bytes]) -> str:
    """The name of a new adapter of the client's organization."""
    base = next(m.id for m in client.models.list() if not m.id.startswith("ft:"))
    file = client.files.create(file=("orders.jsonl", b"\n".join(lines)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 4}
    )
    return follow(client, job).fine_tuned_model


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keys", nargs=2, required=True, metavar="KEY")
    options.add_argument("--examples", type=int, default=24)
    args = options.parse_args()
    acme, globex = (OpenAI(base_url=args.base_url, api_key=key) for key in args.keys)

    half = args.examples // 2
    ours = train(acme, LINES[:half])
    theirs = train(globex, LINES[half : args.examples])
    for client, own, other in ((acme, ours, theirs), (globex, theirs, ours)):
        print(f"{own}: {ask(client, own, QUESTION)}")
        try:
            ask(client, other, QUESTION)
        except openai.NotFoundError as error:
            print(f"{other}: {error.body['message']}")  # type: ignore[index]
        served = [model.id for model in client.models.list()]
        if own not in served or other in served:
            raise SystemExit(f"The list of models is not its own: {served}")
        files = [file.id for file in client.files.list()]
        print(f"It has {len(files)} file(s) and sees {len(served)} models")


if __name__ == "__main__":
    main()
