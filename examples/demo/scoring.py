"""Asks held-out questions and scores the answers."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

DATA = Path(__file__).parent.parent / "data"
KEYS = {"customer", "item", "quantity", "city"}


@dataclass(frozen=True)
class Answer:
    """A model's answer to a held-out question."""

    question: str
    expected: str
    text: str

    @property
    def well_formed(self) -> bool:
        """It is JSON with exactly the expected keys."""
        return isinstance(_parse(self.text), dict) and set(_parse(self.text)) == KEYS

    @property
    def correct(self) -> bool:
        """Every value is right, too."""
        return _parse(self.text) == json.loads(self.expected)


@dataclass(frozen=True)
class Score:
    """Shares of the answers, 0 to 1."""

    well_formed: float
    correct: float

    @classmethod
    def of(cls, answers: list[Answer]) -> "Score":
        count = len(answers)
        return cls(
            sum(a.well_formed for a in answers) / count, sum(a.correct for a in answers) / count
        )


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def ask(client: OpenAI, model: str) -> list[Answer]:
    """The model's answers to all held-out questions, greedy."""
    pairs = [
        [message["content"] for message in json.loads(line)["messages"]]
        for line in (DATA / "heldout.jsonl").read_text().splitlines()
    ]

    def one(pair: list[str]) -> Answer:
        question, expected = pair
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
        )
        return Answer(question, expected, response.choices[0].message.content or "")

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, pairs))
