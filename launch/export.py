"""Policies between layouts, and out of runs: `python launch/export.py --policy FOLDER | --run FOLDER --out FOLDER ...`

    python launch/export.py --run runs/mine --out exported                    # newest checkpoint; the run may go on
    python launch/export.py --run runs/mine --layout adapter --out adapter    # LoRA, in peft's format
    python launch/export.py --policy runs/mine/policy --out exported
    python launch/export.py --policy Janus-Pro-7B --overlay iter_4999.pth --layout transformers --out sft

An original checkpoint comes back bit for bit where nothing has trained it.
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a policy in another layout, with an overlay merged into it.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", metavar="FOLDER", help="checkpoint of either layout")
    source.add_argument("--run", metavar="FOLDER", help="run folder: what its newest usable checkpoint has trained")
    parser.add_argument("--step", type=int, metavar="N", help="of --run: the checkpoint of this step")
    parser.add_argument("--overlay", metavar="FILE", help="of --policy: state dict whose tensors replace its own")
    parser.add_argument(
        "--layout", choices=("original", "transformers", "adapter"), default="original", help="adapter: of --run"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what checkpoint or run says")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args()
    if (arguments.run and arguments.overlay) or (
        arguments.policy and (arguments.step is not None or arguments.layout == "adapter")
    ):
        parser.error("--overlay goes with --policy, --step and --layout adapter with --run")

    import torch

    from rlpipe.config import ConfigError
    from rlpipe.learn.checkpoint import CheckpointError as RunCheckpointError
    from rlpipe.learn.export import export_run
    from rlpipe.paths import resolve_path
    from rlpipe.policy.checkpoint import CheckpointError, stored_dtype
    from rlpipe.policy.janus import JanusPolicy

    dtype, origin = getattr(torch, arguments.dtype) if arguments.dtype else None, ""
    try:
        if arguments.run:
            folder, dtype = export_run(arguments.run, arguments.out, arguments.layout, arguments.step, dtype)
            origin = f", from {folder}"
        else:
            path = resolve_path(arguments.policy)
            dtype = dtype or stored_dtype(path)
            policy = JanusPolicy.load(path, dtype, overlay=arguments.overlay)
            write = policy.export if arguments.layout == "original" else policy.save
            write(arguments.out, dtype)
    except (FileNotFoundError, ConfigError, CheckpointError, RunCheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {arguments.layout} layout, {str(dtype).removeprefix('torch.')}{origin}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
