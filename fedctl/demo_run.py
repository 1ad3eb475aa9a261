"""One demo from start to end: data, federation, run, results. Leaves no process behind, whatever ends it."""

import contextlib
import queue
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedcore.home_lock import claimed
from fedctl.admin import Admin
from fedctl.demo_data import DemoData, prepare_data
from fedctl.demo_federation import (
    LocalFederation,
    open_operator,
    start_agents,
    start_coordinator,
    wait_for_sites,
)
from fedctl.demo_plan import plan_document, to_toml
from fedctl.demo_processes import ProcessGroup, child_environment
from fedctl.demo_results import collect, final_figures
from fedctl.following import follow_run
from fedctl.render import console, note
from fedctl.run_commands import submit_plan
from fedctl.run_view import stage_line
from fedctl.run_watch import LiveRun

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2

RESULTS = (
    "rounds.jsonl", "report.html", "model.safetensors", "model.json", "impressions.safetensors", "plan.toml",
    "partition.json",
)  # fmt: skip
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line asks for. `rounds` and `sites` None leave the choice to the data set."""

    dataset: str
    data: Path | None
    sites: int | None
    rounds: int | None
    strategy: str
    alpha: float
    seed: int
    out: Path

    def command(self) -> str:
        """The command that repeats the demo."""
        parts = ["fedctl", "demo", "--dataset", self.dataset]
        if self.data is not None:
            parts += ["--data", str(self.data)]
        if self.sites is not None:
            parts += ["--sites", str(self.sites)]
        if self.rounds is not None:
            parts += ["--rounds", str(self.rounds)]
        parts += ["--strategy", self.strategy]
        return shlex.join([*parts, "--alpha", f"{self.alpha:g}", "--seed", str(self.seed)])


@dataclass(frozen=True, slots=True)
class DemoResult:
    """How the demo ended. `document` is the JSON object of operations.md."""

    state: str
    reason: str
    document: dict[str, Any]


def run_demo(options: DemoOptions) -> DemoResult:
    """Run a demo. Raises ConfigError, DataError, ConflictError (the folder is in use), ComputeError (a
    program died).
    """
    out = options.out.resolve()
    with _ended_by_signals(), _claimed(out), _work_folder(out) as work:
        note(f"preparing {options.dataset} ...")
        data = prepare_data(
            options.dataset,
            options.data,
            sites=options.sites,
            alpha=options.alpha,
            seed=options.seed,
            folder=work / "data",
            record=out / "partition.json",
        )
        plan = plan_document(
            dataset=options.dataset,
            sites=[site.name for site in data.sites],
            rounds=options.rounds,
            strategy=options.strategy,
            seed=options.seed,
            class_names=data.class_names,
            image_shape=data.image_shape,
            updates_data=data.coordinator,
        )
        (out / "plan.toml").write_text(to_toml(plan), encoding="utf-8")
        with ProcessGroup(out / "logs", child_environment()) as group:
            federation = LocalFederation.plan(work, "demo")
            note("starting the coordinator ...")
            start_coordinator(federation, group)
            with open_operator(federation) as admin:
                note(f"enrolling and starting {len(data.sites)} agents ...")
                start_agents(federation, group, admin, data.sites, data.class_names)
                wait_for_sites(admin, group, data.sites)
                run = submit_plan(admin, out / "plan.toml")
                last = _follow(admin, group, run)
                return _finish(options, admin, last, data=data, out=out, work=work)


def _finish(
    options: DemoOptions, admin: Admin, run: "admin_pb2.Run", *, data: DemoData, out: Path, work: Path
) -> DemoResult:
    from fedcore.report.page import write_report

    collected = collect(admin, run.run, out, work)
    report = out / "report.html"
    facts = {
        "run": run.run,
        "data": data.description,
        "strategy": options.strategy,
        "sites": str(len(data.sites)),
        "split": data.split,
        "seed": str(options.seed),
    }
    if run.reason and run.state != "DONE":
        facts["reason"] = run.reason
    write_report(
        report,
        title=f"Federated {options.dataset}",
        state=run.state,
        facts=facts,
        records=collected.records,
        impressions=collected.pictures,
        class_names=data.class_names,
        holdings=data.holdings,
        command=options.command(),
        plan_toml=(out / "plan.toml").read_text(encoding="utf-8"),
    )
    document = {
        "run": run.run,
        "dataset": options.dataset,
        "strategy": options.strategy,
        "rounds": run.round,
        "final": final_figures(collected.records[-1] if collected.records else None),
        "report": str(report),
    }
    return DemoResult(run.state, run.reason, document)


def _follow(admin: Admin, group: ProcessGroup, run: str) -> "admin_pb2.Run":
    """Show progress on stderr until the run has ended. Raises ComputeError as soon as a program dies."""
    last: admin_pb2.Run | None = None
    if not sys.stderr.isatty():
        told = ""
        for last in _updates(admin, group, run):
            line = stage_line(last)
            if line != told:
                note(line)
                told = line
    else:
        from rich.live import Live

        view = LiveRun([])
        with Live(get_renderable=view.render, console=console(sys.stderr), refresh_per_second=4) as live:
            for last in _updates(admin, group, run):
                view.update(last)
            live.refresh()
    assert last is not None, "following ends with a final state"
    return last


def _updates(admin: Admin, group: ProcessGroup, run: str) -> Iterator["admin_pb2.Run"]:
    """The run after every change, while all programs live: another thread waits for the stream."""
    arrived: queue.SimpleQueue[admin_pb2.Run | BaseException | None] = queue.SimpleQueue()

    def receive() -> None:
        try:
            for update in follow_run(admin, run, on_trouble=lambda text: None):
                arrived.put(update)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=receive, name="follow", daemon=True).start()
    while True:
        try:
            item = arrived.get(timeout=_POLL_S)
        except queue.Empty:
            group.check()
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            # The coordinator's own end explains a lost connection better than the connection does.
            group.check()
            raise item
        yield item


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the demo's folder, emptied of an earlier demo's results. Raises ConflictError if another demo
    holds it.
    """
    with claimed(out, "demo"):
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        for stale in out.glob("work-*"):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(out / "logs", ignore_errors=True)
        (out / "logs").mkdir()
        yield


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder for homes, keys and data, gone in the end. On the disk of `out`: /tmp may be small or
    memory.
    """
    work = Path(tempfile.mkdtemp(prefix="work-", dir=out))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exit that cleans up, as Ctrl-C does."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
