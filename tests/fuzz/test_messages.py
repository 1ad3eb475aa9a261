from tests.fuzz.messages import TARGETS
from tests.fuzz.target import driven

test_only_documented_errors = driven(TARGETS)
