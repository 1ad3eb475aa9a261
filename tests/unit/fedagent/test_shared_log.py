"""What an operator may read of an agent's log: harmless fields of lines whose text is ours, if the policy says so."""

import ast
from pathlib import Path

import pytest
import structlog

from fedagent.policy import SitePolicy, load_policy
from fedagent.shared_log import SHARED_FIELDS, LogRing, SharedLog
from fedcore.logs import configure_logs
from fedcore.v1 import federation_pb2

ROOT = Path(__file__).parents[3]
ASKED = federation_pb2.ReadLog(nonce=7, lines=2, asked_by="operator/ann")


@pytest.fixture
def ring(tmp_path: Path):
    ring = LogRing(max_lines=3)
    with (tmp_path / "log").open("w") as stream:
        configure_logs("info", stream, keep=ring)
        yield ring
    structlog.reset_defaults()


def test_fields_that_could_tell_something_stay_at_the_site(ring: LogRing) -> None:
    log = structlog.get_logger()
    log.debug("not logged, not kept")
    log.error(
        "task failed",
        run="r-1",
        round=3,
        code="data_invalid",
        error="/data/doe_john.png: label 'flu'",
        path="x",
    )
    (line,) = ring.last(10)
    assert (line.level, line.event) == ("error", "task failed")
    assert dict(line.fields) == {
        "run": "r-1", "round": "3", "code": "data_invalid", "left_out": "error, path",
    }  # fmt: skip
    assert "doe" not in str(line)


def test_the_ring_is_bounded_and_gives_the_last_lines_in_order(ring: LogRing) -> None:
    log = structlog.get_logger()
    for number in range(5):
        log.info("said", number=number)
    assert [line.fields["number"] for line in ring.last(99)] == ["2", "3", "4"]
    assert [line.fields["number"] for line in ring.last(2)] == ["3", "4"]
    assert ring.last(0) == []


def test_only_a_policy_that_says_so_shares_the_log(ring: LogRing, tmp_path: Path) -> None:
    structlog.get_logger().info("said")
    refused = SharedLog(ring, load_policy(tmp_path / "policy.toml")).answer(ASKED)
    assert (refused.nonce, len(refused.lines)) == (7, 0)
    assert refused.refusal == "refuses: policy does not share the agent's log"
    given = SharedLog(ring, SitePolicy(share_logs=True)).answer(ASKED)
    assert (given.nonce, given.refusal, [line.event for line in given.lines]) == (7, "", ["said"])


def _texts() -> list[tuple[str, ast.expr]]:
    """The first argument of every call that logs, in what an agent's control process may load."""
    found = []
    for path in [*(ROOT / "fedagent").rglob("*.py"), *(ROOT / "fedcore").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) in ("log", "_log")
                and node.func.attr in ("debug", "info", "warning", "error", "exception", "critical")
            ):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.args[0]))
    return found


def _literal(text: ast.expr) -> bool:
    if isinstance(text, ast.IfExp):
        return _literal(text.body) and _literal(text.orelse)
    return isinstance(text, ast.Constant)


def test_the_text_of_a_log_line_is_a_literal() -> None:
    """It goes to operators as it is: what varies belongs into a field, of which only some are shared."""
    texts = _texts()
    assert len(texts) > 15
    assert [where for where, text in texts if not _literal(text)] == []


def test_no_field_for_free_text_is_shared() -> None:
    assert not {"error", "reason", "line", "path", "message", "exc_info", "home", "what"} & SHARED_FIELDS
