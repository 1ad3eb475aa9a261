"""The targets under a coverage-guided fuzzer, one process each: `make fuzz` runs it after Hypothesis.

usage: python -m tests.fuzz.guided [--minutes 10] [--only NAME]

Needs atheris (`pip install '.[fuzz]'`). A finding's bytes are kept in `fuzz-findings/`; exit 1 if there is one. An input
that takes 20 s or 2 GB is a finding.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

FINDINGS = Path("fuzz-findings")
_TIMEOUT_S, _MEMORY_MB = 20, 2048


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["fedcore", "fedserver", "fedagent", "fedctl"]):
        from tests.fuzz.all_targets import TARGETS
    from tests.fuzz.target import emptied

    target = TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    words = corpus.with_name("words")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if len(word) <= 64))
    folder = corpus.with_name("files")
    folder.mkdir()
    arguments = [
        name, str(corpus), f"-max_total_time={seconds}", f"-timeout={_TIMEOUT_S}", f"-rss_limit_mb={_MEMORY_MB}",
        f"-artifact_prefix={FINDINGS}/{name}-", f"-dict={words}", "-max_len=8192", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup(arguments, lambda data: target.check(data, emptied(folder)))
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> int:
    """Fuzz every target for its share of the time; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--fuzz", nargs=3, metavar=("NAME", "SECONDS", "CORPUS"), help="what a child does")
    asked = parser.parse_args()
    if asked.fuzz:
        fuzz(asked.fuzz[0], int(asked.fuzz[1]), Path(asked.fuzz[2]))
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install '.[fuzz]'", file=sys.stderr)
        return 2
    from tests.fuzz.all_targets import TARGETS

    chosen = [name for name in TARGETS if asked.only in name]
    seconds = max(1, round(60 * asked.minutes / len(chosen)))
    FINDINGS.mkdir(exist_ok=True)
    found = []
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="fedimpres-fuzz-") as folder:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            command = [sys.executable, "-m", "tests.fuzz.guided", "--fuzz", name, str(seconds), str(corpus)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(
            f"{name:22} {runs[0] if runs else '?':>9} inputs  {'ok' if done.returncode == 0 else 'FOUND'}",
            flush=True,
        )
        if done.returncode:
            found.append(name)
            print(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}", file=sys.stderr)
    print(f"{len(found)} of {len(chosen)} targets broke a promise{': ' if found else ''}{', '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
