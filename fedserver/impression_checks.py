"""A site's check of its impressions, from the wire to the journal. Pure."""

import math

from pydantic import ValidationError

from fedcore.errors import NonFiniteError, TransferError
from fedcore.impression_check import ImpressionCheck
from fedcore.plan import describe_problems
from fedcore.v1 import federation_pb2


def check_from_proto(message: federation_pb2.ImpressionCheck, who: str) -> ImpressionCheck:
    """What a site found, as the journal keeps it. `who` opens the message: "site-07 round 12".

    Raises NonFiniteError for a distance that is no number, TransferError for counts and distances that can't be.
    """
    # Set fields alone; a count of 0 is not "set" in the message, and the check wants it.
    found = {
        name: getattr(message, name) for name, f in ImpressionCheck.model_fields.items() if f.is_required()
    }
    found |= {field.name: value for field, value in message.ListFields()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{who}: its check of the impressions says {name} = {value}, expected a finite number"
            )
    try:
        return ImpressionCheck(**found)
    except ValidationError as error:
        raise TransferError(
            f"{who}: its check of the impressions can't be: {describe_problems(error)}"
        ) from error
