"""What stands between the matrix products of a decoding step, compiled for this CPU: `kernels.cpp`.

Compiled at first use by the system's C++ compiler and kept in the user's cache folder. Where that does not work the
decoder says so once and does the same in plain torch, several times slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -Wno-psabi -shared -fPIC -fopenmp".split()
HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.bfloat16)
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "normalise": [*[_POINTER] * 4, _INTEGER, _INTEGER, ctypes.c_float],
    "gate": [_POINTER, _POINTER, _INTEGER, _INTEGER],
    "attend": [*[_POINTER] * 5, _INTEGER, _INTEGER, _POINTER, _INTEGER, _POINTER, *[_INTEGER] * 5, ctypes.c_int],
}
_ENOUGH_FOR_THREADS = 1 << 18
"""Numbers that a step's attention reads, below which waking a second thread costs more than it saves."""


class Kernels:
    """The compiled functions for one dtype; `load` gives None where there are none. Arguments are contiguous."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self._functions = {}
        for function, arguments in _ARGUMENTS.items():
            self._functions[function] = getattr(library, f"{function}_{name}")
            self._functions[function].argtypes = arguments
        self._normalise, self._gate, self._attend = self._functions.values()

    @classmethod
    def load(cls, config: object, head_dim: int, dtype: torch.dtype, device: torch.device) -> Kernels | None:
        """For a language model's configuration (transformers'), if it has sizes that the kernels know."""
        sizes = config.hidden_size % 16 == 0 and config.intermediate_size % 16 == 0 and head_dim in HEAD_DIMS
        if device.type != "cpu" or dtype not in DTYPES or not sizes or config.hidden_act != "silu":
            return None
        library = compiled()
        return None if library is None else cls(library, dtype)

    def normalise(self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add `delta` to x [R, D] in place, where there is one; the root-mean-square norm of the sum."""
        out = torch.empty_like(x)
        added = None if delta is None else delta.data_ptr()
        self._normalise(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [R, F] of [R, 2 F]."""
        rows, size = gate_up.shape
        out = gate_up.new_empty(rows, size // 2)
        self._gate(gate_up.data_ptr(), out.data_ptr(), rows, size // 2)
        return out

    def attend(
        self,
        qkv: torch.Tensor,
        rotation: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Rotate the queries and keys of one input per row, write its slot, attend to the slots up to it: [R, D].

        qkv [R, (heads + 2 kv heads) * head size]; rotation complex64 [positions, head size / 2]; positions int64 [R];
        keys, values [R, kv heads, slots, head size], contiguous in the last two dimensions; bias [R, 1, 1, slots].
        """
        rows, kv_heads, _, size = keys.shape
        heads = qkv.shape[1] // size - 2 * kv_heads
        out = qkv.new_empty(rows, heads * size)
        many = 2 * rows * kv_heads * size * slot > _ENOUGH_FOR_THREADS
        self._attend(
            qkv.data_ptr(),
            rotation.data_ptr(),
            positions.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            None if bias is None else bias.data_ptr(),
            0 if bias is None else bias.stride(0),
            out.data_ptr(),
            rows,
            heads,
            kv_heads,
            size,
            slot,
            torch.get_num_threads() if many else 1,
        )
        return out


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The library for this machine, compiled if it is not there yet; None, and a warning, where that fails."""
    try:
        return ctypes.CDLL(str(_library()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        log.warning(
            "rollout kernels: not compiled, drawing on the CPU is several times slower; install g++ or set CXX (%s)",
            output.strip().splitlines()[-1] if output.strip() else error,
        )
        return None


def _library() -> Path:
    compiler = os.environ.get("CXX", "g++")
    what = [SOURCE.read_bytes(), " ".join([compiler, *FLAGS]).encode(), _processor().encode()]
    name = hashlib.sha256(b"\0".join(what)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlpipe"
    library = folder / f"kernels-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            target.replace(library)  # at once: another process may be doing the same
    return library


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
