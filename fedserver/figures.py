"""From what the sites reported to a round's record. Pure."""

from collections.abc import Iterable

from fedcore.round_record import ImpressionFigures, RecalibrationFigures, RoundRecord, SiteFigures
from fedserver.forgetting import update_scores
from fedserver.round_events import Metrics
from fedserver.round_state import Round, RunState

NOT_SHARED = "sites do not share per-class counts (policy share_class_metrics)"


def pooled(metrics: Iterable[Metrics]) -> Metrics | None:
    """Sum figures over sites; per-class counts only if every site with images gave them. None without images."""
    present = [m for m in metrics if m.num_examples > 0]
    if not present:
        return None
    shared = all(m.class_totals for m in present)
    return Metrics(
        split=present[0].split,
        num_examples=sum(m.num_examples for m in present),
        num_correct=sum(m.num_correct for m in present),
        loss_sum=sum(m.loss_sum for m in present),
        class_totals=_add(m.class_totals for m in present) if shared else (),
        class_correct=_add(m.class_correct for m in present) if shared else (),
    )


def _add(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def accuracy(metrics: Metrics | None) -> float | None:
    """Share of images recognised."""
    return metrics.num_correct / metrics.num_examples if metrics is not None else None


def recalls(metrics: Metrics | None, class_names: tuple[str, ...]) -> dict[str, float] | None:
    """Recall of each class that occurs; None without per-class counts."""
    if metrics is None or not metrics.class_totals:
        return None
    rows = zip(class_names, metrics.class_totals, metrics.class_correct, strict=True)
    return {name: correct / total for name, total, correct in rows if total > 0}


def held_out(metrics: tuple[Metrics, ...]) -> Metrics | None:
    """The split that figures are reported on: test, or validation where a site has no test images."""
    by_split = {m.split: m for m in metrics if m.num_examples > 0}
    return by_split.get("test") or by_split.get("validation")


def round_record(state: RunState, current: Round, now: float, bytes_down: int) -> RoundRecord:
    """The record of a round whose sites have all reported or been let go. `now` is wall-clock seconds."""
    sites = {
        s: m for s in sorted(current.evaluations) if s and (m := held_out(current.evaluations[s])) is not None
    }
    own = held_out(current.evaluations.get("", ()))
    pool = pooled(sites.values())
    by_class = recalls(own or pool, state.plan.class_names)
    validation = pooled(
        m for s, ms in current.evaluations.items() if s for m in ms if m.split == "validation"
    )
    made, note = current.synthesised or (0, "")
    return RoundRecord(
        round=current.number,
        expected=len(current.expected),
        registered=len([s for s in current.registered if s in current.expected]),
        started=len(current.started),
        reported=len(current.reported) + len(set(current.rejected) - set(current.reported)),
        aggregated=len(current.accepted),
        accuracy=accuracy(own or pool),
        balanced_accuracy=sum(by_class.values()) / len(by_class) if by_class else None,
        balanced_accuracy_note="" if by_class else NOT_SHARED,
        validation_accuracy=accuracy(validation),
        loss=pool.loss_sum / pool.num_examples if pool is not None else None,
        sites={
            s: SiteFigures(accuracy=m.num_correct / m.num_examples, num_examples=m.num_examples)
            for s, m in sites.items()
        },
        classes=by_class,
        impressions=ImpressionFigures(
            made=made,
            used={s: u.report.num_impressions for s, u in sorted(current.reported.items())},
            note=note,
            figures=dict(current.synthesis_figures),
            checks={
                s: check
                for s, u in sorted(current.reported.items())
                if (check := u.report.impression_check) is not None
            },
        ),
        update_scores=update_scores(current.scores, state.plan.class_names) if current.scores else None,
        recalibration=_recalibration(current) if state.statistic_tensors else None,
        phases_s=_phases(current, now, state.overlaps),
        seconds=max(0.0, now - current.opened_at),
        bytes_up=sum(u.payload_bytes for u in current.reported.values())
        + sum(late.update.payload_bytes for late in current.folding.values()),
        bytes_down=bytes_down,
        missing=_missing(current),
        attempts=current.attempt,
        gate=dict(sorted(current.verdicts.items())),
        merge=current.merge,
        folded=dict(sorted(current.folded.items())),
        model=current.released or "",
        impressions_digest=current.new_impressions or "",
        training={
            s: u.report.model_dump(exclude={"num_impressions", "impression_check"})
            for s, u in sorted(current.reported.items())
        },
    )


def _recalibration(current: Round) -> RecalibrationFigures:
    return RecalibrationFigures(
        num_examples={
            s: found.num_examples
            for s, found in sorted(current.statistics.items())
            if s not in current.not_measured
        },
        left_out=dict(sorted(current.not_measured.items())),
        note=current.not_recalibrated,
    )


def _missing(current: Round) -> dict[str, str]:
    missing = {}
    for site in current.expected:
        if site in current.accepted:
            continue
        if site in current.rejected:
            missing[site] = f"update refused: {current.rejected[site]}"
        else:
            missing[site] = current.let_go.get(site) or _why_absent(current.absent.get(site))
    return missing


def _why_absent(reason: str | None) -> str:
    return "not there when the round opened" + (f": {reason}" if reason else "")


def _phases(current: Round, now: float, overlaps: bool) -> dict[str, float]:
    closed = current.closed_at or now
    aggregated = current.aggregated_at or closed
    # When the model that is evaluated and synthesised through was there.
    ready = current.recalibrated_at or aggregated
    phases = {
        "training": closed - current.opened_at,
        "aggregating": aggregated - closed,
        "evaluating": (current.evaluated_at or ready) - ready,
    }
    if current.recalibrated_at is not None:
        phases["recalibrating"] = ready - aggregated
    if current.synthesised_at is not None:
        phases["synthesising"] = current.synthesised_at - (current.opened_at if overlaps else ready)
    return {name: round(max(0.0, seconds), 4) for name, seconds in phases.items()}
