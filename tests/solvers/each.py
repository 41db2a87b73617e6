"""The processes on which solvers are tested."""

import pytest

from tests.helpers import slow_but
from tests.oracle import ALL_PROCESSES

# two of them by default, all with the slow tests: each takes long
each_process = pytest.mark.parametrize('process_name', slow_but(['rf', 've'], ALL_PROCESSES))
