"""Writes train.jsonl and heldout.jsonl: orders in plain words, answers as JSON of a fixed form."""

import json
import random
from pathlib import Path

ITEMS = ["apples", "candles", "notebooks", "lamps", "chairs", "mugs", "bikes", "tents", "roses",
         "pens", "boots", "clocks", "drums", "kites", "pillows", "ladders", "scarves", "hammers",
         "plates", "radios"]  # fmt: skip
CITIES = ["Oslo", "Lima", "Cairo", "Paris", "Quito", "Delhi", "Turin", "Leeds", "Osaka", "Perth",
          "Dakar", "Sofia", "Tampa", "Kyoto", "Basel", "Porto"]  # fmt: skip
NAMES = ["Ana", "Bo", "Carl", "Dina", "Eve", "Finn", "Gus", "Hana", "Ivan", "Jane", "Kim", "Leo",
         "Mia", "Nora", "Omar", "Pia"]  # fmt: skip
FORMS = [
    "{name} orders {n} {item} to {city}.",
    "Please send {n} {item} to {name} in {city}.",
    "{n} {item} for {name}, {city}.",
    "Hello, this is {name} from {city}, I need {n} {item}.",
    "Ship {n} {item} to {city}, attention {name}.",
]


def example(rng: random.Random) -> tuple[str, str]:
    order = {
        "customer": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
        "quantity": rng.randint(2, 60),
        "city": rng.choice(CITIES),
    }
    text = rng.choice(FORMS).format(
        name=order["customer"], n=order["quantity"], item=order["item"], city=order["city"]
    )
    return text, json.dumps(order)


def main() -> None:
    rng = random.Random(7)
    examples: dict[str, str] = {}
    while len(examples) < 264:
        text, answer = example(rng)
        examples[text] = answer
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        + "\n"
        for text, answer in examples.items()
    ]
    folder = Path(__file__).parent
    (folder / "train.jsonl").write_text("".join(lines[:240]))
    (folder / "heldout.jsonl").write_text("".join(lines[240:]))


if __name__ == "__main__":
    main()
