"""The Access service: roles of operators, and what the caller may do."""

from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import NotFoundError
from fedcore.v1 import access_pb2, access_pb2_grpc
from fedserver.audit_policy import ACTIONS
from fedserver.authorisation import ROLES
from fedserver.call_audit import note, roles_of_call
from fedserver.grants import Grants
from fedserver.interceptors import caller_of


class AccessService(access_pb2_grpc.AccessServicer):
    """Message <-> grants, nothing else."""

    def __init__(self, grants: Grants) -> None:
        self._grants = grants

    async def GrantRole(  # noqa: N802 - the name in the contract
        self, request: access_pb2.ChangeRoleRequest, context: Any
    ) -> access_pb2.ListRolesReply:
        """Give an operator a role."""
        note(f"operator/{request.operator}", granted=request.role)
        await self._grants.grant(request.operator, request.role, caller_of(context).id)
        return self._reply(request.operator)

    async def RevokeRole(  # noqa: N802
        self, request: access_pb2.ChangeRoleRequest, context: Any
    ) -> access_pb2.ListRolesReply:
        """Take a role away."""
        note(f"operator/{request.operator}", revoked=request.role)
        await self._grants.revoke(request.operator, request.role)
        return self._reply(request.operator)

    async def ListRoles(  # noqa: N802
        self, request: access_pb2.ListRolesRequest, context: Any
    ) -> access_pb2.ListRolesReply:
        """All grants, or one operator's."""
        return self._reply(request.operator)

    async def CanI(  # noqa: N802
        self, request: access_pb2.CanIRequest, context: Any
    ) -> access_pb2.CanIReply:
        """Answer from the very table that authorises calls. Raises NotFoundError for an unknown action."""
        takes: dict[str, frozenset[str]] = {}
        for method, rule in ACTIONS.items():
            takes[rule.action] = takes.get(rule.action, frozenset()) | ROLES.get(method, frozenset())
        if request.action:
            if request.action not in takes:
                raise NotFoundError(
                    f"no action {request.action[:80]!r}", hint="'fedctl auth can-i' lists all of them"
                )
            takes = {request.action: takes[request.action]}
        mine = roles_of_call()
        return access_pb2.CanIReply(
            answers=[
                access_pb2.ActionAnswer(action=action, allowed=bool(roles & mine), roles=sorted(roles))
                for action, roles in sorted(takes.items())
            ]
        )

    def _reply(self, operator: str) -> access_pb2.ListRolesReply:
        return access_pb2.ListRolesReply(
            grants=[
                access_pb2.Grant(
                    operator=one.operator, role=one.role, granted_at=one.granted_at, granted_by=one.granted_by
                )
                for one in self._grants.rows(operator)
            ]
        )
