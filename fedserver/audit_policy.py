"""What each method does, by its name in the audit log, and when its calls are recorded: one table.

A test holds it to the services' own method sets. Whatever the table says, a refused call is recorded.
"""

from dataclasses import dataclass
from enum import Enum


class Recorded(Enum):
    """When a call that is let in becomes a record."""

    # It reads what every operator may read, or is part of a call that is recorded.
    NO = "no"
    # With its result, before the caller is answered.
    AFTER = "after"
    # Before the first byte goes out, and again if it then fails: what can't be recorded is not shown.
    BEFORE = "before"


@dataclass(frozen=True, slots=True)
class Rule:
    """`action` is noun.verb: the word of the log, and of `fedctl auth can-i`. Several methods may share one."""

    action: str
    recorded: Recorded = Recorded.NO


_NO, _AFTER, _BEFORE = Recorded.NO, Recorded.AFTER, Recorded.BEFORE

ACTIONS: dict[str, Rule] = {
    "/fedcore.v1.Enrollment/Enroll": Rule("member.enroll", _AFTER),
    "/fedcore.v1.Enrollment/RenewEnded": Rule("certificate.renew-ended", _AFTER),
    "/fedcore.v1.Enrollment/RequestEnrollment": Rule("enrollment.request", _AFTER),
    "/fedcore.v1.Enrollment/CheckEnrollment": Rule("enrollment.check"),
    "/fedcore.v1.Membership/CreateOperatorToken": Rule("operator.invite", _AFTER),
    "/fedcore.v1.Membership/ListEnrollments": Rule("enrollment.list"),
    "/fedcore.v1.Membership/ApproveEnrollment": Rule("enrollment.approve", _AFTER),
    "/fedcore.v1.Membership/DenyEnrollment": Rule("enrollment.deny", _AFTER),
    "/fedcore.v1.Certificates/Renew": Rule("certificate.renew", _AFTER),
    "/fedcore.v1.Certificates/ListCertificates": Rule("certificate.list"),
    "/fedcore.v1.Certificates/RevokeCertificates": Rule("certificate.revoke", _AFTER),
    "/fedcore.v1.Certificates/GetAuthority": Rule("ca.show"),
    "/fedcore.v1.Certificates/RotateAuthority": Rule("ca.rotate", _AFTER),
    "/fedcore.v1.Federation/Hello": Rule("site.hello", _AFTER),
    "/fedcore.v1.Federation/Directives": Rule("site.connect"),
    "/fedcore.v1.Federation/Fetch": Rule("artifact.fetch", _AFTER),
    "/fedcore.v1.Federation/DeliveryOffset": Rule("update.offset"),
    "/fedcore.v1.Federation/Deliver": Rule("update.deliver", _AFTER),
    "/fedcore.v1.Admin/WhoAmI": Rule("auth.whoami"),
    "/fedcore.v1.Admin/GetStatus": Rule("status.read"),
    "/fedcore.v1.Admin/CreateToken": Rule("token.create", _AFTER),
    "/fedcore.v1.Admin/ListSites": Rule("site.list"),
    "/fedcore.v1.Admin/SubmitRun": Rule("run.submit", _AFTER),
    "/fedcore.v1.Admin/ListRuns": Rule("run.list"),
    "/fedcore.v1.Admin/GetRun": Rule("run.show"),
    "/fedcore.v1.Admin/WatchRun": Rule("run.watch"),
    "/fedcore.v1.Admin/PauseRun": Rule("run.pause", _AFTER),
    "/fedcore.v1.Admin/ResumeRun": Rule("run.resume", _AFTER),
    "/fedcore.v1.Admin/AbortRun": Rule("run.abort", _AFTER),
    "/fedcore.v1.Admin/ListRounds": Rule("run.rounds"),
    "/fedcore.v1.Admin/ListModels": Rule("model.list"),
    "/fedcore.v1.Admin/Download": Rule("artifact.download", _BEFORE),
    "/fedcore.v1.Admin/UploadModel": Rule("model.upload", _AFTER),
    "/fedcore.v1.Sites/EnableSite": Rule("site.enable", _AFTER),
    "/fedcore.v1.Sites/DrainSite": Rule("site.drain", _AFTER),
    "/fedcore.v1.Sites/DisableSite": Rule("site.disable", _AFTER),
    "/fedcore.v1.Sites/RemoveSite": Rule("site.remove", _AFTER),
    "/fedcore.v1.Sites/PingSite": Rule("site.ping", _AFTER),
    "/fedcore.v1.Sites/ReadSiteLog": Rule("site.logs", _AFTER),
    "/fedcore.v1.Audit/ReadAudit": Rule("audit.read", _BEFORE),
    "/fedcore.v1.Operations/GetHealth": Rule("server.health"),
    "/fedcore.v1.Operations/GetConfig": Rule("server.config"),
    "/fedcore.v1.Operations/SetDrain": Rule("server.drain", _AFTER),
    "/fedcore.v1.Operations/GetSoftware": Rule("server.software"),
    "/fedcore.v1.Operations/CheckPlan": Rule("run.plan"),
    "/fedcore.v1.Operations/WatchEvents": Rule("run.logs"),
    "/fedcore.v1.Operations/CollectBundle": Rule("server.debug-bundle", _BEFORE),
    "/fedcore.v1.Impressions/ListImpressions": Rule("impressions.list"),
    "/fedcore.v1.Impressions/GetImpressions": Rule("impressions.show"),
    "/fedcore.v1.Impressions/PreviewImpressions": Rule("impressions.preview", _BEFORE),
    "/fedcore.v1.Impressions/PurgeImpressions": Rule("impressions.purge", _AFTER),
    "/fedcore.v1.Backup/CreateBackup": Rule("backup.create", _BEFORE),
    "/fedcore.v1.Access/GrantRole": Rule("role.grant", _AFTER),
    "/fedcore.v1.Access/RevokeRole": Rule("role.revoke", _AFTER),
    "/fedcore.v1.Access/ListRoles": Rule("role.list"),
    "/fedcore.v1.Access/CanI": Rule("auth.can-i"),
    "/grpc.health.v1.Health/Check": Rule("health.read"),
    "/grpc.health.v1.Health/List": Rule("health.read"),
    "/grpc.health.v1.Health/Watch": Rule("health.read"),
}

# A method outside the table is denied, and the denial recorded.
UNKNOWN = Rule("rpc.unknown")
