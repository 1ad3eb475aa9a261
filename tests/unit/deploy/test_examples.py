"""The example configurations are valid, and name every rule that a policy can have."""

from pathlib import Path

from fedagent.config import AgentConfig
from fedagent.policy import SitePolicy, load_policy
from fedcore.config import load_config

CONFIG = Path(__file__).parents[3] / "deploy" / "config"


def test_the_examples_are_valid():
    assert load_config(CONFIG / "agent.toml", AgentConfig).data.path == "/srv/images/ward-7.npz"
    policy = load_policy(CONFIG / "policy.toml")
    left_out = {
        name for name in SitePolicy.model_fields if getattr(policy, name) == getattr(SitePolicy(), name)
    }
    # As they are by default, written out; and the narrower twin of `strategies`.
    assert left_out == {"receive_impressions", "recalibrate", "show_impressions", "objectives"}
