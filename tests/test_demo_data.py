import importlib.util
import json
from pathlib import Path

import pytest

from examples.demo.scoring import DATA, KEYS, Answer, Score
from flexllm_vllm.data.records import parse_record

ORDER = {"customer": "Mia", "item": "lamps", "quantity": 12, "city": "Oslo"}


def pairs(name: str) -> list[tuple[str, str]]:
    lines = (DATA / name).read_text().splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    assert all([m["role"] for m in pair] == ["user", "assistant"] for pair in messages)
    return [(user["content"], assistant["content"]) for user, assistant in messages]


def test_there_are_enough_distinct_examples_and_none_is_held_out() -> None:
    train = {question for question, _ in pairs("train.jsonl")}
    heldout = {question for question, _ in pairs("heldout.jsonl")}
    assert len(train) == len(pairs("train.jsonl")) >= 200
    assert len(heldout) == len(pairs("heldout.jsonl")) >= 24
    assert not train & heldout


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_answer_says_what_the_question_says(name: str) -> None:
    for question, answer in pairs(name):
        order = json.loads(answer)
        assert set(order) == KEYS
        assert all(str(value) in question for value in order.values())


def test_the_server_accepts_every_line() -> None:
    for number, line in enumerate((DATA / "train.jsonl").read_bytes().splitlines(), 1):
        parse_record(number, line)


def test_the_files_are_what_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("generate", DATA / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "generate.py"))
    generate.main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "well_formed", "correct"),
    [
        (json.dumps(ORDER), True, True),
        (json.dumps({**ORDER, "quantity": "12"}), True, False),
        (json.dumps({**ORDER, "note": ""}), False, False),
        (f"Sure: {json.dumps(ORDER)}", False, False),
        ("[]", False, False),
        ("12", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_scored_on_its_form_and_on_its_values(
    text: str, well_formed: bool, correct: bool
) -> None:
    answer = Answer("Mia orders 12 lamps to Oslo.", json.dumps(ORDER), text)
    assert (answer.well_formed, answer.correct) == (well_formed, correct)
    assert Score.of([answer]) == Score(float(well_formed), float(correct))
