"""Checkpoints between layouts: `python launch/export.py --policy FOLDER --out FOLDER [--layout original|transformers]`

    python launch/export.py --policy runs/mine/policy --out exported
    python launch/export.py --policy Janus-Pro-7B --overlay iter_4999.pth --layout transformers --out sft

An original checkpoint comes back bit for bit where nothing has trained it.
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a policy in another layout, with an overlay merged into it.")
    parser.add_argument("--policy", required=True, metavar="FOLDER", help="checkpoint of either layout")
    parser.add_argument("--overlay", metavar="FILE", help="state dict whose tensors replace those of the checkpoint")
    parser.add_argument("--layout", choices=("original", "transformers"), default="original")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the checkpoint says")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args()

    import torch

    from rlpipe.paths import resolve_path
    from rlpipe.policy.checkpoint import CheckpointError, stored_dtype
    from rlpipe.policy.janus import JanusPolicy

    try:
        path = resolve_path(arguments.policy)
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else stored_dtype(path)
        policy = JanusPolicy.load(path, dtype, overlay=arguments.overlay)
        write = policy.export if arguments.layout == "original" else policy.save
        write(arguments.out, dtype)
    except (FileNotFoundError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {arguments.layout} layout, {str(dtype).removeprefix('torch.')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
