"""What a node uses under load comes back; `make soak` asks for half an hour."""

from pathlib import Path

import pytest
from tests.faults.crash import Broken
from tests.faults.soak import Soak, check_memory


@pytest.mark.timeout(300)
def test_threads_memory_and_open_files_return_to_where_they_began(tmp_path: Path) -> None:
    soak = Soak(tmp_path)
    soak.run(24)
    assert soak.counts["series"] > 5 and soak.counts["restarts"] == 2
    assert soak.counts["bare connections"] > 50 and soak.counts["aborted associations"] > 5


def test_memory_that_grows_by_little_for_long_is_found() -> None:
    levels_off = [100.0 + min(minute, 8) + minute % 3 / 2 for minute in range(24)]
    check_memory(100.0, levels_off)
    with pytest.raises(Broken, match="does not level off"):
        check_memory(100.0, [100.0 + 0.3 * minute for minute in range(24)])
    with pytest.raises(Broken, match="when warm"):
        check_memory(100.0, [150.0])
