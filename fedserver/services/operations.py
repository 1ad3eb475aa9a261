"""The Operations service: is the coordinator well, how is it set up, may it open rounds."""

import json
from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.text import printable
from fedcore.v1 import operations_pb2, operations_pb2_grpc
from fedcore.version import software_version
from fedserver.call_audit import note
from fedserver.config import ServerConfig
from fedserver.drain import Drain
from fedserver.effective_config import settings_of
from fedserver.health_facts import HealthFacts
from fedserver.interceptors import caller_of
from fedserver.round_driver import RoundDriver

_MAX_REASON = 300


class OperationsService(operations_pb2_grpc.OperationsServicer):
    """Message <-> what the parts say of themselves, nothing else."""

    def __init__(self, config: ServerConfig, driver: RoundDriver, health: HealthFacts) -> None:
        self._config = config
        self._driver = driver
        self._health = health

    async def GetHealth(  # noqa: N802 - the name in the contract
        self, request: operations_pb2.GetHealthRequest, context: Any
    ) -> operations_pb2.GetHealthReply:
        """Look at every part now."""
        facts = await self._health.collect()
        return operations_pb2.GetHealthReply(
            healthy=all(fact.healthy for fact in facts),
            facts=[
                operations_pb2.HealthFact(
                    check=fact.check,
                    subject=fact.subject,
                    healthy=fact.healthy,
                    says=fact.says,
                    hint=fact.hint,
                    figures=fact.figures,
                )
                for fact in facts
            ],
            drain=self._drain_state(),
            software_version=software_version(),
        )

    async def GetConfig(  # noqa: N802
        self, request: operations_pb2.GetConfigRequest, context: Any
    ) -> operations_pb2.GetConfigReply:
        """The configuration that was read at the start."""
        return operations_pb2.GetConfigReply(
            settings=[
                operations_pb2.Setting(key=one.key, value_json=json.dumps(one.value), from_file=one.from_file)
                for one in settings_of(self._config)
            ]
        )

    async def SetDrain(  # noqa: N802
        self, request: operations_pb2.SetDrainRequest, context: Any
    ) -> operations_pb2.DrainState:
        """Open no further round, or open them again. A repeated drain keeps its beginning."""
        reason = printable(request.reason, _MAX_REASON)
        note("coordinator", draining=request.draining, reason=reason)
        if not request.draining:
            self._driver.drain(None)
        elif self._driver.draining is None:
            self._driver.drain(Drain.begun(caller_of(context).id, reason, self._driver.wall()))
        return self._drain_state()

    def _drain_state(self) -> operations_pb2.DrainState:
        drain, under_way = self._driver.draining, self._driver.under_way()
        state = operations_pb2.DrainState(quiet=not under_way, under_way=under_way)
        if drain is not None:
            state.draining, state.since = True, drain.since_text
            state.by, state.reason = drain.by, drain.reason
        return state
