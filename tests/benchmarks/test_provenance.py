"""What a result says of itself names nothing of the machine that it was made on."""

from __future__ import annotations

import sys
from pathlib import Path

from provenance import provenance

from rlpipe.paths import ROOT


def test_a_command_keeps_its_arguments_and_no_folder_of_the_machine(monkeypatch, tmp_path: Path) -> None:
    inside, outside = ROOT / "benchmarks/results/a.json", tmp_path / "before"
    monkeypatch.setattr(
        sys, "argv", ["b.py", "--json", str(inside), f"--before={outside}", "run.dir=runs/x", "--n", "3"]
    )
    command = provenance()["command"]
    assert command == "python b.py --json benchmarks/results/a.json --before=before run.dir=runs/x --n 3"
