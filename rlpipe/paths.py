"""Where a relative path of a configuration is looked for."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository, or the folder that the package is installed in."""


def resolve_path(path: str | Path) -> Path:
    """The absolute path of an input file or folder.

    A relative path is looked for in the working directory, then beside the `rlpipe` package, so that shipped
    assets and configs are found from anywhere. Where neither exists it is the one in the working directory.

        resolve_path("rlpipe/world/assets/policy")
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    beside_package = ROOT / path
    return beside_package if beside_package.exists() and not path.exists() else path.absolute()
