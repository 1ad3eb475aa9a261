"""Alerts, dashboard and runbooks are held to the code: every metric, every page and every command line is real."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from fedagent.metrics import AgentMetrics
from fedcore.clock import ManualClock
from fedcore.metrics_page import new_registry
from fedserver.metrics import CoordinatorMetrics
from fedserver.run_meter import RunMeter

ROOT = Path(__file__).parents[3]
RUNBOOKS = ROOT / "docs" / "runbooks"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "fedimpres.json"
PAGES = sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README")


def names(registry: CollectorRegistry) -> set[str]:
    """Every name that a query may use."""
    found = set()
    for family in registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return found


def known() -> set[str]:
    server, agent = RunMeter(new_registry()), new_registry()
    CoordinatorMetrics(cast(Any, None), ManualClock(), server)
    AgentMetrics(cast(Any, None), agent)
    return names(server.registry) | names(agent)


def used(query: str) -> set[str]:
    return set(re.findall(r"\b(?:fedimpres|process)_\w+", re.sub(r'"[^"]*"', "", query)))


def alerts() -> dict[str, dict[str, str]]:
    """Alert -> its keys, of the file's own plain form: one `key: value` a line."""
    found: dict[str, dict[str, str]] = {}
    for line in ALERTS.read_text().splitlines():
        key, _, value = line.strip().removeprefix("- ").partition(": ")
        if key == "alert":
            present = found[value] = {}
        elif found and value:
            present[key] = value
    return found


def test_every_alert_uses_metrics_that_exist_and_names_a_page_that_exists() -> None:
    assert len(alerts()) >= 10
    metrics = known()
    for alert, keys in alerts().items():
        assert used(keys["expr"]) or "up{" in keys["expr"], alert
        assert used(keys["expr"]) <= metrics, alert
        page = keys["runbook_url"].rpartition("/")[2]
        assert page.removesuffix(".md") in PAGES, alert
        assert keys["severity"] in ("page", "ticket"), alert
        assert {"for", "summary", "description"} <= keys.keys(), alert


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_alerts() -> None:
    done = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboard_uses_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) >= 10
    for query in queries:
        assert used(query), query
        assert used(query) <= known(), query


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_options() -> dict[str, tuple[bool, set[str]]]:
    """Command path -> whether it is a group, and its options."""
    made = generator()
    return {
        context.command_path: (
            hasattr(command, "commands"),
            {"--help"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)},
        )
        for _, below in made.programs()
        for command, context in below
    }


def command_lines(page: str) -> list[str]:
    """What a page says to type: its code blocks' lines and its inline code that begin with a program of ours."""
    text = (RUNBOOKS / f"{page}.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.splitlines()] + inline
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\|", line.partition(" #")[0])]
    parts = [re.sub(r"^(runuser -u \w+ -- |sudo )", "", part) for part in parts]
    return [part for part in parts if re.match(r"fed(ctl|server|agent) \S", part)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_runbook_exists(page: str) -> None:
    commands = command_options()
    for line in command_lines(page):
        words = shlex.split(line)
        depth = max(n for n in range(1, len(words) + 1) if " ".join(words[:n]) in commands)
        is_group, options = commands[" ".join(words[:depth])]
        rest = words[depth:]
        assert not (is_group and rest and not rest[0].startswith("-")), f"{page}: no such command: {line}"
        given = {word.partition("=")[0] for word in rest if word.startswith("-") and len(word) > 1}
        assert given <= options, f"{page}: {line}: no option {given - options}"


def test_every_page_is_whole_and_in_the_index() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    for page in PAGES:
        assert f"({page}.md)" in index, page
        text = (RUNBOOKS / f"{page}.md").read_text()
        assert {"## Check", "## Do", "## Verify"} <= set(text.splitlines()), page


def test_hints_in_the_code_name_pages_that_exist() -> None:
    sources = [
        path
        for name in ("fedcore", "fedserver", "fedagent", "fedctl")
        for path in (ROOT / name).rglob("*.py")
    ]
    hints = {name for path in sources for name in re.findall(r"the runbook ([a-z-]+)", path.read_text())}
    assert hints
    assert hints <= set(PAGES)
