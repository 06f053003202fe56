"""A decoding step and the drawing of a token, compiled for this CPU: `kernels.cpp`.

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
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "products.h", "vectors.h")]
FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -Wno-psabi -shared -fPIC -fopenmp".split()
HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.bfloat16)
_POINTER, _INTEGER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "normalise": [*[_POINTER] * 4, *[_INTEGER] * 2, _FLOAT],
    "gate": [*[_POINTER] * 2, *[_INTEGER] * 2],
    "multiply": [*[_POINTER] * 4, *[_INTEGER] * 3, _INT],
    "multiply_wide": [*[_POINTER] * 4, *[_INTEGER] * 3, _INT],
    "decode": [*[_POINTER] * 5, _INTEGER, _INT],
}
_CHOOSE = [_POINTER, *[_INTEGER] * 2, _INT, *[_FLOAT] * 2, *[_POINTER] * 3]
_ENOUGH_FOR_THREADS = 1 << 20
"""Multiplications, below which waking a second thread costs more than it saves."""


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INTEGER) for name in ("layer_stride", "row_stride", "head_stride")),
        ("bias", _POINTER),
        *((name, _INTEGER) for name in ("bias_stride", "slot")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("layers", "norm", "rotation")),
        *((name, _INTEGER) for name in ("num_layers", "width", "inner", "heads", "kv_heads", "size")),
        ("eps", _FLOAT),
    ]


class Kernels:
    """The compiled functions for one dtype; `load` gives None where there are none. Arguments are contiguous."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype, name = dtype, str(dtype).removeprefix("torch.")
        functions = []
        for function, arguments in _ARGUMENTS.items():
            functions.append(getattr(library, f"{function}_{name}"))
            functions[-1].argtypes, functions[-1].restype = arguments, None
        self._normalise, self._gate, self._multiply, self._multiply_wide, self._decode = functions
        self._choose = library.choose
        self._choose.argtypes, self._choose.restype = _CHOOSE, None

    @classmethod
    def load(cls, config: object, head_dim: int, dtype: torch.dtype, device: torch.device) -> Kernels | None:
        """For a language model's configuration (transformers'), if it has sizes that the kernels know."""
        sizes = config.hidden_size % 16 == 0 and config.intermediate_size % 16 == 0 and head_dim in HEAD_DIMS
        if device.type != "cpu" or dtype not in DTYPES or not sizes or config.hidden_act != "silu":
            return None
        library = compiled()
        return None if library is None else cls(library, dtype)

    def panels(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] in the order that `multiply` reads, [out / 16, .., 16, ..]; out is padded to sixteens."""
        weight = F.pad(weight, (0, 0, 0, -len(weight) % 16))
        paired = 1 if self.dtype == torch.float32 else 2
        return weight.view(len(weight) // 16, 16, -1, paired).transpose(1, 2).contiguous()

    def multiply(self, x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
        """x [R, in] by `panels`, bias float32 [out]: [R, out] in the kernels' dtype; in float32 if `wide`."""
        rows, inputs = x.shape
        outputs = 16 * len(panels)
        out = x.new_empty(rows, outputs, dtype=torch.float32 if wide else self.dtype)
        threads = self._threads(rows * inputs * outputs)
        added = None if bias is None else bias.data_ptr()
        function = self._multiply_wide if wide else self._multiply
        function(x.data_ptr(), panels.data_ptr(), added, out.data_ptr(), rows, inputs, outputs, threads)
        return out

    def normalise(self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add `delta` to x [R, D] float32 in place, where there is one; the root-mean-square norm of the sum."""
        out = torch.empty_like(x, dtype=self.dtype)
        added = None if delta is None else delta.data_ptr()
        self._normalise(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [R, F] of [R, 2 F]."""
        rows, size = gate_up.shape
        out = gate_up.new_empty(rows, size // 2)
        self._gate(gate_up.data_ptr(), out.data_ptr(), rows, size // 2)
        return out

    def model(self, layers: Sequence[Sequence[torch.Tensor]], norm: torch.Tensor, **sizes: int | float) -> _Model:
        """What `decode` knows of a language model. It holds pointers: the tensors have to stay where they are.

        layers: per layer norm, qkv, out, mlp_norm, gate_up, down; matrices as panels. sizes: see kernels.cpp.
        """
        pointers = [tensor.data_ptr() for layer in layers for tensor in layer]
        table = (_POINTER * len(pointers))(*pointers)
        model = _Model(ctypes.cast(table, _POINTER), norm.data_ptr(), num_layers=len(layers), **sizes)
        model.table = table  # keeps it alive
        return model

    def decode(
        self,
        model: _Model,
        x: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """One input per row through all layers and the last norm: [R, D] of x float32 [R, D], which is used up.

        Writes `slot` and attends to the slots up to it. positions int64 [R]; keys, values [layers, R, kv heads,
        slots, head size], contiguous in the last two dimensions; bias [R, 1, 1, slots].
        """
        rows = len(x)
        out = torch.empty_like(x, dtype=self.dtype)
        cache = _Cache(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], slot=slot)
        if bias is not None:
            cache.bias, cache.bias_stride = bias.data_ptr(), bias.stride(0)
        threads = self._threads(rows * model.num_layers * model.width * (4 * model.width + 3 * model.inner + 2 * slot))
        self._decode(
            ctypes.addressof(model), ctypes.addressof(cache), positions.data_ptr(), x.data_ptr(), out.data_ptr(),
            rows, threads,
        )  # fmt: skip
        return out

    @staticmethod
    def can_choose(size: int, temperature: float, top_k: int, top_p: float) -> bool:
        """Whether `choose` knows so many tokens and this sampling: with chance, without truncation."""
        return size % 16 == 0 and temperature > 0.0 and top_p >= 1.0 and not 0 < top_k < size

    def choose(
        self, logits: torch.Tensor, chance: torch.Tensor, guidance: float = 1.0, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`sampling.choose` of guided logits without truncation: tokens int64 [B], log-probs float32 [B].

        logits float32 [B, K] or, with the twins of guided pairs behind them, [2 B, K]; K is a multiple of 16.
        """
        rows, size = len(chance), logits.shape[1]
        tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        self._choose(
            logits.data_ptr(), rows, size, len(logits) > rows, guidance, temperature,
            chance.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(),
        )  # fmt: skip
        return tokens, logprobs

    def _threads(self, multiplications: int) -> int:
        return torch.get_num_threads() if multiplications > _ENOUGH_FOR_THREADS else 1


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
    what = [*(source.read_bytes() for source in SOURCES), " ".join([compiler, *FLAGS]).encode(), _processor().encode()]
    name = hashlib.sha256(b"\0".join(what)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlpipe"
    library = folder / f"kernels-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(target)]
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
