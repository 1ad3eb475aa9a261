from tests.fuzz.target import driven
from tests.fuzz.tensors import TARGETS

test_only_documented_errors = driven(TARGETS)
