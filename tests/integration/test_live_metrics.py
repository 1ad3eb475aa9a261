"""What Prometheus reads from a coordinator and an agent at work."""

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.federation_fixture import SHARING, Federation, digits_plan, wait_until

pytestmark = pytest.mark.slow


def page(federation: Federation, program: str) -> dict[tuple[str, str], float]:
    """What a program shows now, by name and the value of the last label."""
    url = f"http://127.0.0.1:{federation.metrics_ports[program]}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, next(reversed(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_programs_at_work_show_what_they_do(federation: Federation) -> None:
    with federation.training(digits_plan(seed=2811), SHARING) as run:

        def trains() -> dict[tuple[str, str], float] | None:
            shown = page(federation, SHARING)
            begun = (
                shown["fedimpres_agent_task", "train"] and shown["fedimpres_agent_received_bytes_total", ""]
            )
            return shown if begun else None

        agent = wait_until(trains, "the agent shows that it trains, and the model that it fetched")
        assert agent["fedimpres_agent_task", "evaluate"] == 0
        assert agent["fedimpres_agent_connected", ""] == agent["fedimpres_agent_takes_work", ""] == 1
        assert agent["fedimpres_agent_last_contact_seconds", ""] == 0
        assert 0 < agent["fedimpres_agent_disk_free_bytes", ""] < agent["fedimpres_agent_disk_size_bytes", ""]
        assert 0 < agent["fedimpres_agent_certificate_left_seconds", ""] <= 30 * 86_400
        before = page(federation, "coordinator")
        assert before["fedimpres_site_connected", SHARING] == before["fedimpres_round_number", ""] == 1
        assert before["fedimpres_run_rounds", ""] == 2
    assert federation.wait(run).state == "DONE"
    finished = "fedimpres_rounds_finished_total", ""

    def shown_after() -> dict[tuple[str, str], float] | None:  # a page is a few seconds old
        shown = page(federation, "coordinator")
        return shown if shown[finished] > before[finished] + 1 else None

    after = wait_until(shown_after, "the coordinator shows both rounds")
    assert after[finished] == before[finished] + 2
    sent = "fedimpres_agent_sent_bytes_total", ""
    update = (page(federation, SHARING)[sent] - agent[sent]) / 2
    received = "fedimpres_received_bytes_total", ""
    assert after[received] - before[received] >= update > 0
