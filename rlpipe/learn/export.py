"""The policy of a run as its newest usable checkpoint has it; the run may be going on, and no learner is needed."""

from __future__ import annotations

from pathlib import Path

import torch

from rlpipe.config import load_config
from rlpipe.learn.checkpoint import read_newest_weights, read_weights, step_folder
from rlpipe.policy.adapter import save_adapter
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import merge


def export_run(
    run: str | Path, out: str | Path, layout: str, step: int | None = None, dtype: torch.dtype | None = None
) -> tuple[Path, torch.dtype]:
    """Write what a run has trained to a new folder; returns the checkpoint that was read, and the type.

    layout: original or transformers (the whole policy, adapters merged), or adapter (peft's format).
    step:   of the checkpoint; None: the newest that is usable.
    dtype:  of the whole policy; None: policy.dtype of the run. Adapters stay in float32.

    Raises FileNotFoundError, ConfigError, CheckpointError (of either kind).
    """
    run, out = Path(run), Path(out)
    config = load_config(run / "config.yaml")
    section, dtype = config.policy, dtype or getattr(torch, config.policy.dtype)
    if layout == "adapter" and not section.lora.rank:
        raise FileNotFoundError(f"--layout: {run} has trained no adapter; give original or transformers")
    if out.exists() and any(out.iterdir()):
        raise FileNotFoundError(f"--out: {out} is not empty; give a new folder")
    checkpoints = run / "checkpoints"
    if step is None:
        folder, tensors = read_newest_weights(checkpoints)
    else:
        folder = step_folder(checkpoints, step)
        tensors = read_weights(folder)
    if layout == "adapter":
        save_adapter(out, tensors, section)
        return folder, torch.float32
    policy = JanusPolicy.from_config(config, getattr(torch, section.dtype))
    if section.lora.rank:
        merge(policy, tensors, section.lora)
    else:
        parameters = dict(policy.janus.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
    write = policy.export if layout == "original" else policy.save
    write(out, dtype)
    return folder, dtype
