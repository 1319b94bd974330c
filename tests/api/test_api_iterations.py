from typing import Any

import httpx
import pytest


def test_the_engines_records_are_passed_on(server: Any) -> None:
    answer = httpx.get(f"{server.url}/v1/finetuning/iterations", params={"last": 3}).json()
    assert answer["object"] == "list"
    assert [record["decode_tokens"] for record in answer["data"]] == [0, 1, 2]


@pytest.mark.parametrize("last", ["0", "-1", "x", "100000000"])
def test_a_wrong_number_is_refused(server: Any, last: str) -> None:
    answer = httpx.get(f"{server.url}/v1/finetuning/iterations", params={"last": last})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "last"


def test_an_engine_that_does_not_answer_is_a_503(server: Any) -> None:
    async def dead(last: int) -> list[dict[str, Any]]:
        raise RuntimeError("dead")

    server.service.fetch_iterations = dead
    answer = httpx.get(f"{server.url}/v1/finetuning/iterations")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"


def test_a_server_without_engine_answers_503(server: Any) -> None:
    server.app.state.finetuning = None
    answer = httpx.get(f"{server.url}/v1/files")
    assert answer.status_code == 503
