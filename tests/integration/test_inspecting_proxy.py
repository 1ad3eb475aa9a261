"""A proxy that opens TLS between a site and the real coordinator: the site is told so, and by whose certificate."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.federation_fixture import PROBE, Federation, wait_until
from tests.foreign_certificate import write_foreign_certificate

PROXY = Path(__file__).parents[1] / "connect_proxy.py"
ISSUER = "Corp Inspection CA"


@contextmanager
def inspecting_proxy(certificate: Path) -> Iterator[str]:
    """A CONNECT proxy on loopback that shows the certificate in a folder; its address."""
    with subprocess.Popen(
        [sys.executable, PROXY, "127.0.0.1", "0", certificate / "tls.crt", certificate / "tls.key"],
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            yield f"http://127.0.0.1:{running.stdout.readline().split()[-1]}"
        finally:
            running.terminate()


def test_the_agent_names_a_proxy_that_opens_tls(federation: Federation, tmp_path: Path) -> None:
    write_foreign_certificate(tmp_path / "corp", "127.0.0.1", ISSUER)
    home = tmp_path / "home"
    shutil.copytree(federation.site_home(PROBE), home)
    token = federation.ctl("enroll", "token", "create", "--site", "clinic-e", "-o", "json").json
    with inspecting_proxy(tmp_path / "corp") as address:
        refused = federation.command(
            "fedagent", "enroll", "--home", str(tmp_path / "new"), "--coordinator", token["coordinator"],
            "--token", token["token"], "--ca-fingerprint", token["ca_fingerprint"], "--proxy", address,
        )  # fmt: skip
        (home / "agent.toml").write_text(f'proxy = "{address}"\nreconnect_max_s = 1.0\n')
        doctor = federation.command("fedagent", "doctor", "--home", str(home))
        federation.start("inspected", "fedagent", "serve", "--home", str(home))
        try:
            wait_until(
                lambda: ISSUER in federation.log("inspected"), "the agent names the certificate's issuer"
            )
        finally:
            federation.kill("inspected")
    assert refused.code == 3
    said = next(line for line in federation.log("inspected").splitlines() if ISSUER in line)
    for text in (refused.err, said):
        assert "shows a certificate chain that is not the federation's" in text
        assert f"issued by 'CN={ISSUER}'" in text
        assert "most likely a proxy or firewall opens TLS" in text
    (line,) = [line for line in doctor.out.splitlines() if line.split()[1] == "inspection"]
    assert line.startswith("FAIL")
    assert ISSUER in line
