"""A bank of impressions as `fedctl impression` shows it: one document for programs, rows and lines for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedctl.durations import format_bytes
from fedctl.render import Column

if TYPE_CHECKING:
    from fedcore.v1 import federation_pb2, impressions_pb2

LIST_COLUMNS = [
    Column("RUN", "run"), Column("ROUND", "round", True), Column("STATE", "state"), Column("IMAGES", "images", True),
    Column("CLASSES", "classes", True), Column("SIZE", "size", True), Column("SITES", "sites"),
    Column("DIGEST", "digest"),
]  # fmt: skip
_DIGEST_DIGITS = 12


def bank_document(bank: "impressions_pb2.ImpressionBank", *, full: bool = False) -> dict[str, Any]:
    """The keys of `-o json`; with `full`, those that only `impression show` is told."""
    document: dict[str, Any] = {
        "run": bank.run,
        "round": bank.round,
        "digest": bank.digest,
        "state": bank.state,
        "in_use": bank.in_use,
        "num_images": bank.num_images,
        "bytes": bank.bytes,
        "classes": {one.name: one.num_images for one in bank.classes},
        "holders": [{"site": one.site, "copy": one.copy, "connected": one.connected} for one in bank.holders],
        "lives_on_in": list(bank.lives_on_in),
        "purge": _purge_document(bank) if bank.HasField("purge") else None,
    }
    if full:
        document |= {
            "born": {str(one.round): one.num_images for one in bank.born},
            "figures": dict(sorted(bank.figures.items())),
            "note": bank.note or None,
            "checks": [
                {"site": one.site, "round": one.round, **_check_document(one.check)} for one in bank.checks
            ],
        }
    return document


def list_row(bank: "impressions_pb2.ImpressionBank") -> dict[str, Any]:
    """A row of `impression list`."""
    stored = bank.state == "stored"
    return {
        "run": bank.run,
        "round": bank.round,
        "state": f"{bank.state}, in use" if bank.in_use else bank.state,
        "images": bank.num_images if stored else "–",
        "classes": len(bank.classes) if stored else "–",
        "size": format_bytes(bank.bytes) if stored else "–",
        "sites": _sites_text(bank),
        "digest": bank.digest[:_DIGEST_DIGITS],
    }


def bank_lines(bank: "impressions_pb2.ImpressionBank") -> list[tuple[str, Any]]:
    """Labels and values of `impression show`."""
    lines: list[tuple[str, Any]] = [
        ("run", bank.run),
        ("round", bank.round),
        ("digest", bank.digest),
        ("state", f"{bank.state}, in use" if bank.in_use else bank.state),
    ]
    if bank.state == "stored":
        lines += [
            ("impressions", f"{bank.num_images} ({format_bytes(bank.bytes)})"),
            ("classes", ", ".join(f"{one.name}: {one.num_images}" for one in bank.classes)),
        ]
    lines += [(f"begun in round {one.round}", one.num_images) for one in bank.born]
    lines += [(name.replace("_", " "), value) for name, value in sorted(bank.figures.items())]
    if bank.note:
        lines.append(("note", bank.note))
    lines += [(f"check at {one.site}, round {one.round}", _check_text(one.check)) for one in bank.checks]
    if bank.lives_on_in:
        lines.append(
            ("lives on in", f"{_rounds(bank.lives_on_in)}, whose banks hold images begun here or before")
        )
    if bank.HasField("purge"):
        purge = bank.purge
        lines.append(("purged", f"{purge.at} by {purge.by}: {purge.reason}"))
        lines += [(f"site {site.site}", _confirmation_text(site)) for site in purge.sites]
    lines += [
        (f"copy at {one.site}", _copy_text(one))
        for one in bank.holders
        if bank.state != "purged" or one.copy == "holds"
    ]
    return lines


def next_steps(reply: "impressions_pb2.PurgeImpressionsReply") -> list[str]:
    """What an operator reads after a purge: who is to confirm, and where the same pictures are still."""
    if not reply.banks:
        return []
    run = reply.banks[0].run
    lines = [] if reply.purged else ["they were purged before; nothing was changed"]
    if reply.other_runs:
        lines.append(f"the same bytes were removed from other runs too: {', '.join(reply.other_runs)}")
    later = sorted({number for bank in reply.banks for number in bank.lives_on_in})
    if later:
        lines.append(
            f"the banks of {_rounds(later)} hold pictures of it too: each goes on from the one before; "
            f"fedctl impression purge {run} --all removes them"
        )
    outstanding = {site.site for bank in reply.banks for site in bank.purge.sites if not site.confirmed_at}
    if outstanding:
        command = f"fedctl impression show {run} --round {reply.banks[-1].round}"
        lines.append(
            f"deleted here; asked of {', '.join(sorted(outstanding))} ({command} says who has confirmed)"
        )
    return lines


def _rounds(numbers: Sequence[int]) -> str:
    return f"round{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _sites_text(bank: "impressions_pb2.ImpressionBank") -> str:
    """How many sites hold a bank, or how far its purge has come, in words."""
    if bank.HasField("purge"):
        done = sum(bool(site.confirmed_at) for site in bank.purge.sites)
        return f"{done} of {len(bank.purge.sites)} confirmed"
    holding = [one.site for one in bank.holders if one.copy == "holds"]
    unknown = sum(one.copy == "unknown" for one in bank.holders)
    text = f"{len(holding)} of {len(bank.holders)} hold it"
    return f"{text}, {unknown} unknown" if unknown else text


def _copy_text(holder: "impressions_pb2.ImpressionHolder") -> str:
    if holder.copy == "unknown":
        return "unknown: the site has not said (an older version), or not since the coordinator started"
    said = "yes" if holder.copy == "holds" else "no"
    return said if holder.connected else f"{said}, when it was last connected"


def _confirmation_text(site: "impressions_pb2.PurgedSite") -> str:
    if not site.confirmed_at:
        return "outstanding: it is asked when it connects"
    what = "deleted it" if site.deleted else "had none"
    return (
        f"confirmed {site.confirmed_at}: {what}; record {site.audit_head.partition(':')[0]} of its audit log"
    )


def _purge_document(bank: "impressions_pb2.ImpressionBank") -> dict[str, Any]:
    purge = bank.purge
    return {
        "purge": purge.purge,
        "at": purge.at,
        "by": purge.by,
        "reason": purge.reason,
        "sites": [
            {
                "site": site.site,
                "confirmed_at": site.confirmed_at or None,
                "deleted": site.deleted,
                "audit_head": site.audit_head or None,
            }
            for site in purge.sites
        ],
        "outstanding": [site.site for site in purge.sites if not site.confirmed_at],
    }


def _check_document(check: "federation_pb2.ImpressionCheck") -> dict[str, Any]:
    said = {field.name: value for field, value in check.ListFields()}
    return {
        field.name: said.get(field.name, None if field.has_presence else 0)
        for field in check.DESCRIPTOR.fields
    }


def _check_text(check: "federation_pb2.ImpressionCheck") -> str:
    refused = check.num_near_in_pixels + check.num_near_in_features + check.num_not_finite
    text = (
        f"{refused} of {check.num_checked} refused; pixels: nearest {check.pixel_smallest:.2f}, "
        f"median {check.pixel_median:.2f}, limit {check.pixel_limit:.2f}"
    )
    if check.HasField("feature_smallest"):
        text += f"; features: nearest {check.feature_smallest:.2f}, limit {check.feature_limit:.2f}"
    return text
