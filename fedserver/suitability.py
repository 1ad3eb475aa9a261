"""What a connected site can do, and whether that is enough to take part in a run. Pure."""

from collections.abc import Iterable

from fedcore.text import printable
from fedcore.v1 import federation_pb2
from fedserver.round_state import RunState

_MAX_REASON = 300
_MAX_NAME = 100
_MAX_NAMES = 1000
# As many as a plan's model can have.
_MAX_CLASSES = 10_000


def checked_capabilities(said: federation_pb2.Capabilities) -> federation_pb2.Capabilities:
    """What a site says of itself, cut to what can be kept, journalled and shown: lines of bounded length and number."""
    return federation_pb2.Capabilities(
        software_version=printable(said.software_version, _MAX_NAME),
        models=_names(said.models, _MAX_NAMES),
        objectives=_names(said.objectives, _MAX_NAMES),
        datasets=_names(said.datasets, _MAX_NAMES),
        device=printable(said.device, _MAX_NAME),
        device_name=printable(said.device_name, _MAX_NAME),
        threads=said.threads,
        class_names=_names(said.class_names, _MAX_CLASSES),
        num_examples=max(0, said.num_examples),
        unavailable_reason=printable(said.unavailable_reason, _MAX_REASON),
        knows_read_log=said.knows_read_log,
        knows_recalibrate=said.knows_recalibrate,
    )


def _names(names: Iterable[str], limit: int) -> list[str]:
    return [printable(name, _MAX_NAME) for name in list(names)[:limit]]


def unable_reason(state: RunState, capabilities: federation_pb2.Capabilities) -> str:
    """Why the site can't take part in this run, in words; empty if it can."""
    return printable(_reason(state, capabilities), _MAX_REASON)


def _reason(state: RunState, capabilities: federation_pb2.Capabilities) -> str:
    plan = state.plan
    if capabilities.unavailable_reason:
        return capabilities.unavailable_reason
    if plan.model.name not in capabilities.models:
        return (
            f"model '{plan.model.name}' is not installed there (there are: {', '.join(capabilities.models)})"
        )
    if state.objective and state.objective not in capabilities.objectives:
        return f"objective '{state.objective}' is not installed there (there are: {', '.join(capabilities.objectives)})"
    unknown = [name for name in capabilities.class_names if name not in plan.class_names]
    if unknown and plan.data.class_names is not None:
        return (
            f"its data has class '{unknown[0]}', which the plan does not name ({', '.join(plan.class_names)})"
        )
    return ""
