"""Other tools, where they are installed, make the same of our files as we do.

Versions and figures of a run with all of them are in `benchmarks/results/peers.json`;
`benchmarks/peers.py` says how they were installed.
"""

import json
from pathlib import Path

import pytest

from benchmarks.peers import PEERS, is_there, rows_of

RECORDED = Path(__file__).parents[1] / "benchmarks" / "results" / "peers.json"


@pytest.mark.filterwarnings("ignore")  # theirs; ours are tested with the formats
@pytest.mark.parametrize("name", PEERS)
def test_logits_are_the_same(name: str, tmp_path: Path) -> None:
    if PEERS[name].module:
        pytest.importorskip(PEERS[name].module, reason="equiv does not need it")
    elif not is_there(PEERS[name]):
        pytest.skip(f"no server of {name}; equiv does not need it")
    rows = rows_of(name, tmp_path)
    assert rows
    for row in rows:
        assert row.holds, row


def test_the_recorded_run_had_every_tool() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert list(recorded["peers"]) == list(PEERS) and not recorded["absent"]
    for peer in recorded["peers"].values():
        for row in peer["rows"]:
            assert row["allowed"] is None or row["difference"] <= row["allowed"]
