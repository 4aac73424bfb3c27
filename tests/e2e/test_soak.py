"""What a node uses under load comes back; `make soak` asks for half an hour."""

from pathlib import Path

import pytest
from tests.faults.soak import Soak


@pytest.mark.timeout(300)
def test_threads_memory_and_open_files_return_to_where_they_began(tmp_path: Path) -> None:
    soak = Soak(tmp_path)
    soak.run(24)
    assert soak.counts["series"] > 5 and soak.counts["restarts"] == 2
    assert soak.counts["bare connections"] > 50 and soak.counts["aborted associations"] > 5
