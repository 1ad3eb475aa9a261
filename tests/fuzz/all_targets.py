"""Every target, by its name: what `guided` chooses from."""

from tests.fuzz import audit, backups, configuration, datasets, identities, messages, tensors, updates
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (audit, backups, configuration, datasets, identities, messages, tensors, updates)
    for target in module.TARGETS
}
