"""Lists that come in pages are asked for until their end."""

import json
from types import SimpleNamespace
from typing import Any, cast

from fedcore.v1 import admin_pb2
from fedctl.admin import Admin, list_records
from fedctl.model_commands import list_models


def asked(method: str, reply: Any, field: str, pages: list[list[Any]]) -> tuple[Admin, list[str]]:
    """An `Admin` whose `method` answers with one page after another, and the tokens that it was asked with."""
    tokens: list[str] = []

    def answer(request: Any) -> Any:
        assert request.run == "r"
        tokens.append(request.page_token)
        number = int(request.page_token or 0)
        following = str(number + 1) if number + 1 < len(pages) else ""
        return reply(**{field: pages[number]}, next_page_token=following)

    return Admin(cast(Any, SimpleNamespace(**{method: answer})), "coordinator"), tokens


def test_records_of_all_pages() -> None:
    lines = [[json.dumps({"round": n}) for n in part] for part in ((1, 2), (3,), (4, 5))]
    admin, tokens = asked("ListRounds", admin_pb2.ListRoundsReply, "records_json", lines)
    assert [record["round"] for record in list_records(admin, "r")] == [1, 2, 3, 4, 5]
    assert tokens == ["", "1", "2"]


def test_models_of_all_pages() -> None:
    parts = [[admin_pb2.Model(run="r", round=n) for n in part] for part in ((1, 2), (3,))]
    admin, tokens = asked("ListModels", admin_pb2.ListModelsReply, "models", parts)
    assert [model.round for model in list_models(admin, "r")] == [1, 2, 3]
    assert tokens == ["", "1"]


def test_one_empty_page_is_the_end() -> None:
    admin, tokens = asked("ListRounds", admin_pb2.ListRoundsReply, "records_json", [[]])
    assert list_records(admin, "r") == []
    assert tokens == [""]
