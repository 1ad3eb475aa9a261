"""The configuration as it is shown: whole, and without a secret."""

from pathlib import Path

from pydantic import BaseModel

from fedserver.config import ServerConfig
from fedserver.effective_config import MASK, settings_of


def test_every_key_is_there_with_where_it_comes_from() -> None:
    config = ServerConfig.model_validate({"name": "lab", "host": "h", "compute": {"threads": 2}})
    found = {one.key: one for one in settings_of(config)}
    assert (found["compute.threads"].value, found["compute.threads"].from_file) == (2, True)
    assert (found["compute.device"].value, found["compute.device"].from_file) == ("auto", False)
    assert (found["port"].value, found["port"].from_file) == (8443, False)
    assert MASK not in [one.value for one in found.values()]


def test_secrets_are_masked_but_paths_and_what_is_empty_are_not() -> None:
    class Inner(BaseModel):
        webhook_token: str = "t0p"
        token_file: Path = Path("/run/token")

    class Config(BaseModel):
        backup_passphrase: str = "hush"
        private_key: str = ""
        proxy: str = "http://ann:hush@proxy:3128"
        hooks: list[dict[str, str]] = [{"password": "hush", "url": "https://u:hush@x/"}]
        inner: Inner = Inner()

    found = {one.key: one.value for one in settings_of(Config())}
    assert found == {
        "backup_passphrase": MASK,
        "private_key": "",
        "proxy": f"http://{MASK}@proxy:3128",
        "hooks": [{"password": MASK, "url": f"https://{MASK}@x/"}],
        "inner.webhook_token": MASK,
        "inner.token_file": "/run/token",
    }
