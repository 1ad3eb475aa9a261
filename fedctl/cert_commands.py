"""fedctl cert: the federation's certificates and their CA."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import NotFoundError, UsageError
from fedctl.admin import Admin, open_admin, open_credential
from fedctl.asking import YesOption, agree, check_can_ask
from fedctl.contexts import load_contexts
from fedctl.invocation import Invocation
from fedctl.render import Column, Output, OutputOption, minute, note, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.v1 import certificates_pb2

app = typer.Typer(no_args_is_help=True, help="The certificates of sites, operators and the coordinator.")
ca_app = typer.Typer(no_args_is_help=True, help="The federation's root and issuing CA.")
app.add_typer(ca_app, name="ca")

COLUMNS = [
    Column("SERIAL", "serial"), Column("OWNER", "owner"), Column("STATE", "state"),
    Column("ISSUED", "issued_at"), Column("UNTIL", "not_after"), Column("REASON", "reason", wraps=True),
]  # fmt: skip
_SERIAL_DIGITS = 12

SiteOption = Annotated[str, typer.Option("--site", help="Those of one site.")]
OperatorOption = Annotated[str, typer.Option("--operator", help="Those of one operator.")]
SerialArgument = Annotated[str, typer.Argument(help="Serial number, or a unique beginning of one.")]


@app.command("list")
def list_certificates(
    ctx: typer.Context,
    site: SiteOption = "",
    operator: OperatorOption = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that ended, were replaced or revoked.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the certificates that the coordinator issued and that count, the newest first."""
    role, subject = _owner(site, operator)
    with open_admin(ctx) as admin:
        rows = [
            certificate_document(one)
            for one in _all(admin, role=role, subject=subject, current=not everything)
        ]
    if output is Output.TABLE:
        rows = [
            {
                **row,
                "serial": row["serial"][:_SERIAL_DIGITS],
                "issued_at": minute(row["issued_at"]),
                "not_after": minute(row["not_after"]),
            }
            for row in rows
        ]
    print_rows(output, "certificates", rows, COLUMNS, empty="no such certificates; --all shows ended ones")


@app.command("show")
def show(ctx: typer.Context, serial: SerialArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one certificate: its owner, its life, what it was renewed from and to, who revoked it and why."""
    with open_admin(ctx) as admin:
        document = certificate_document(_one(admin, serial))
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


@app.command("revoke")
def revoke(
    ctx: typer.Context,
    serial: Annotated[
        str, typer.Argument(help="Serial number; what was renewed from it is revoked with it.")
    ] = "",
    site: SiteOption = "",
    operator: OperatorOption = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; the owner reads it.")] = "",
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """End certificates for good: calls with them are refused, open streams end within a second.

    Repeating it changes nothing. The owner comes back with a new token only.
    """
    from fedcore.v1 import certificates_pb2

    if sum(map(bool, (serial, site, operator))) != 1:
        raise UsageError("`cert revoke` needs one of SERIAL, --site and --operator")
    check_can_ask("cert revoke", yes=yes)
    role, subject = _owner(site, operator)
    with open_admin(ctx) as admin:
        if serial:
            found = _one(admin, serial)
            serial, what = found.serial, f"{found.serial} of {_owner_text(found)}"
        else:
            what = f"every certificate of {role} {subject}"
        agree(f"Revoke {what}?", yes=yes)
        request = certificates_pb2.RevokeCertificatesRequest(
            serial=serial, role=role, subject=subject, reason=reason
        )
        reply = admin.call(lambda _: admin.certificates.RevokeCertificates, request)
    rows = [certificate_document(one) for one in reply.certificates]
    if output is not Output.TABLE:
        print_object(output, {"revoked": reply.revoked, "certificates": rows}, [])
        return
    print_rows(output, "certificates", rows, COLUMNS, empty="")
    if not reply.revoked:
        note("they were revoked before; nothing was changed")


@app.command("renew")
def renew(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Renew this operator's own certificate, with a new key; the credential folder is replaced as a whole."""
    invocation: Invocation = ctx.obj
    folder = load_contexts(invocation.config_dir).folder(invocation.context)
    document = renew_credential(folder)
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


@ca_app.command("show")
def show_authority(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show the CA: its root's fingerprint, until when it lives, and whom a rotation waits for."""
    from fedcore.v1 import certificates_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda _: admin.certificates.GetAuthority, certificates_pb2.GetAuthorityRequest())
    _print_authority(output, reply)


@ca_app.command("rotate")
def rotate_authority(
    ctx: typer.Context,
    finish: Annotated[
        bool, typer.Option("--finish", help="Drop the old root and CA; certificates of it are refused then.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --finish: lock out the members that have not renewed.")
    ] = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move the federation to a new root and issuing CA: old and new are both trusted until --finish drops the old.

    Connected agents renew at once, the others when they come back; each operator runs fedctl cert renew.
    """
    from fedcore.v1 import certificates_pb2

    if force and not finish:
        raise UsageError("--force goes with --finish only")
    check_can_ask("cert ca rotate", yes=yes)
    agree("Drop the old CA?" if finish else "Move this federation to a new root and issuing CA?", yes=yes)
    with open_admin(ctx) as admin:
        request = certificates_pb2.RotateAuthorityRequest(finish=finish, force=force)
        reply = admin.call(lambda _: admin.certificates.RotateAuthority, request)
    _print_authority(output, reply)
    if not finish:
        note("next: fedctl cert renew (each operator), then fedctl cert ca rotate --finish")


def _print_authority(output: Output, reply: "certificates_pb2.Authority") -> None:
    waiting = sorted({_owner_text(one) for one in reply.waiting})
    document = {
        "root_fingerprint": reply.root_fingerprint,
        "root_not_after": reply.root_not_after,
        "issuing_not_after": reply.issuing_not_after,
        "root_offline": reply.root_offline,
        "previous_fingerprint": reply.previous_fingerprint or None,
        "waiting": waiting,
    }
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


def renew_credential(folder: Path) -> dict[str, Any]:
    """Replace the credential in a folder by a renewed one; gives the new serial number and its end.

    Raises what the coordinator answers; IdentityError if its answer is not a certificate of this operator. Whatever is
    raised, the folder is as it was.
    """
    from fedcore.credential import accept_renewal, load_credential
    from fedcore.pki import make_request, new_key, serial_text
    from fedcore.v1 import certificates_pb2

    old, key = load_credential(folder, datetime.now(UTC)), new_key()
    with open_credential(folder) as admin:
        request = certificates_pb2.RenewRequest(csr_pem=make_request(key, old.subject.id).decode())
        reply = admin.call(lambda _: admin.certificates.Renew, request)
    accept_renewal(old, key, reply.certificate_chain_pem, reply.ca_pem, datetime.now(UTC))
    new = load_credential(folder, datetime.now(UTC))
    return {
        "serial": serial_text(new.certificate),
        "not_after": new.certificate.not_valid_after_utc.isoformat(),
        "replaced": serial_text(old.certificate),
        "credential": str(folder),
    }


def certificate_document(message: "certificates_pb2.Certificate") -> dict[str, Any]:
    """A certificate as a plain object: the keys of `-o json`."""
    return {
        "serial": message.serial,
        "owner": _owner_text(message),
        "role": message.role,
        "id": message.subject or None,
        "state": message.state,
        "not_before": message.not_before,
        "not_after": message.not_after,
        "issued_at": message.issued_at,
        "issuer": message.issuer or None,
        "renews": message.renews or None,
        "replaced_by": message.replaced_by or None,
        "revoked_at": message.revoked_at or None,
        "revoked_by": message.revoked_by or None,
        "reason": message.reason or None,
    }


def _owner_text(message: "certificates_pb2.Certificate") -> str:
    return f"{message.role}/{message.subject}" if message.subject else message.role


def _owner(site: str, operator: str) -> tuple[str, str]:
    if site and operator:
        raise UsageError("--site and --operator exclude each other")
    return ("site", site) if site else ("operator", operator) if operator else ("", "")


def _all(admin: Admin, **filters: Any) -> "list[certificates_pb2.Certificate]":
    from fedcore.v1 import certificates_pb2

    found: list[certificates_pb2.Certificate] = []
    token = None
    while token != "":
        request = certificates_pb2.ListCertificatesRequest(**filters, page_token=token or "")
        reply = admin.call(lambda _: admin.certificates.ListCertificates, request)
        found += reply.certificates
        token = reply.next_page_token
    return found


def _one(admin: Admin, serial: str) -> "certificates_pb2.Certificate":
    found = _all(admin, serial=serial) if serial else []
    exact = [one for one in found if one.serial == serial.lower()] or found
    if len(exact) != 1:
        raise NotFoundError(
            f"{len(found)} certificates' serial numbers begin with '{serial}', expected one",
            hint="fedctl cert list --all shows them",
        )
    return exact[0]
