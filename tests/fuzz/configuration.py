"""Plans in TOML and as JSON, and every configuration file."""

from pathlib import Path

from pydantic import BaseModel

from fedagent.config import AgentConfig
from fedagent.policy import SitePolicy
from fedcore.config import load_config
from fedcore.credential import CredentialFile
from fedcore.errors import ConfigError, PlanError
from fedcore.plan import load_plan, plan_from_json
from fedctl.contexts import load_contexts
from fedserver.config import ServerConfig
from tests.fuzz.target import TEXT_WORDS, Target, only

_PLAN = b"""
name = "blood"
rounds = 6
min_sites = 2
strategy = "fedimpres"
sites = ["a", "b", "c", "d"]
seed = 3
strategy_options = { ema = 0.5 }
[model]
name = "cnn"
classes = 2
input = [3, 28, 28]
options = { width = 8 }
[training]
epochs = 1
batch_size = 64
learning_rate = 0.02
[synthesis]
warmup_rounds = "auto"
[limits]
round_deadline_s = 300
late_updates = "drop"
[transfer]
updates = "top_k"
top_k_share = 0.1
[data]
class_names = ["x", "y"]
[transform]
mean = [0.1, 0.2, 0.3]
[gate]
norm_factor = 6.0
[aggregation]
rule = "trimmed_mean"
tolerate = 1
"""
_SERVER = b"""
name = "lab"
host = "fed.example.org"
port = 8443
listen = "[::]"
[compute]
device = "cuda:0"
[limits]
requests_per_s = 1.5
[certificates]
site_days = 30
[metrics]
port = 9000
"""
_AGENT = b"""
proxy = "http://10.0.0.1:3128"
reconnect_max_s = 3.0
[data]
kind = "npz"
path = "/data/x.npz"
class_names = ["x", "y"]
options = { max_value = 4095 }
[compute]
threads = 2
[privacy]
check_impressions = true
"""
_POLICY = b"""
models = ["cnn"]
min_images = 10
bandwidth_mbit_s = 8.5
[working_hours]
begin = 18:00:00
end = 06:00:00
days = ["mon", "tue"]
timezone = "Europe/Zurich"
"""
_CREDENTIAL = b'coordinator = "fed.example.org:8443"\nname = "lab"\nrole = "site"\nid = "clinic-a"\nenroll_port = 8444\n'
_CONTEXTS = b'current = "lab"\n[contexts."lab"]\ncredential = "/home/me/operator"\n'
_WORDS = (
    *TEXT_WORDS, b"1979-05-27T07:32:00Z", b"2020-13-45", b"0xffffffffffffffffff", b"true", b"''", b"'../../etc/passwd'",
    b"= [[1], [2]]", b"[a.b]\n", b"a.b = 1\n", b"'''", b"timezone = 'Europe'\n", b"1_000", b"[[sites]]\n",
)  # fmt: skip


def check_plan(data: bytes, folder: Path) -> None:
    path = folder / "plan.toml"
    path.write_bytes(data)
    with only(PlanError):
        plan = load_plan(path)
        assert plan_from_json(plan.to_json()) == plan
        plan_from_json(plan.to_site_json())


def check_plan_json(data: bytes, folder: Path) -> None:
    text = data.decode(errors="surrogateescape")
    with only(PlanError):
        plan = plan_from_json(text)
        assert plan_from_json(plan.to_json()) == plan


def _plan_json() -> list[bytes]:
    from fedcore.plan import parse_plan

    return [parse_plan(_PLAN.decode()).to_json().encode()]


def check_contexts(data: bytes, folder: Path) -> None:
    (folder / "contexts.toml").write_bytes(data)
    with only(ConfigError):
        load_contexts(folder)


def _of(name: str, schema: type[BaseModel], seed: bytes) -> Target:
    def check(data: bytes, folder: Path) -> None:
        path = folder / "file.toml"
        path.write_bytes(data)
        with only(ConfigError):
            load_config(path, schema)

    return Target(name, check, lambda: [seed], _WORDS)


TARGETS = [
    Target("plan", check_plan, lambda: [_PLAN], _WORDS),
    Target("plan_json", check_plan_json, _plan_json),
    _of("fedserver_toml", ServerConfig, _SERVER),
    _of("agent_toml", AgentConfig, _AGENT),
    _of("policy_toml", SitePolicy, _POLICY),
    _of("credential_toml", CredentialFile, _CREDENTIAL),
    Target("contexts_toml", check_contexts, lambda: [_CONTEXTS], _WORDS),
]
