"""The limit of a machine for rollouts: what it can multiply and move, and what a trajectory cannot avoid.

An operation takes at least  max(operations / matmul peak, bytes / bandwidth),  both measured on the machine at hand.
The operations of a step wait for each other (attention for its queries, the next layer for this one, the next token
for the last one), so their times add up; `Phase.overlapped` is the looser bound in which everything overlaps.

Counted for the language model, with P parameters in its layers, b bytes each, L layers, D = heads x head size,
K = key/value heads x head size, R rows (two for each guided row), c slots that a token sees:
  a step           layers     2 P R operations                  P b bytes: the weights, read once for all rows
                   attention  4 D L c R operations              2 K L c R b bytes read, 2 K L R b written
                   head       2 H R operations                  H b bytes, H the parameters of the head that is used
  T inputs at once: the same with T R rows and the mean c, but keys and values are read once for all T inputs and
                   written for all, and the head sees the last input alone.
Counted for pixels: the operations of the module for one image (torch's own counter), its weights read once.
Not counted: activations, norms, the sampler, embeddings, the host. A row reads its own copy of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.kernels import Kernels, compiled
from rlpipe.rollout.linear import Linear
from rlpipe.types import Rollout

Clock = Callable[[], float]


@dataclass(frozen=True)
class Machine:
    """flops: multiplications and additions per second of a large product; bandwidth: bytes read and written per s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    operations: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        return max(self.operations / machine.flops, self.bytes / machine.bandwidth)


@dataclass
class Phase:
    """The work of one phase of a batch, by kind: layers, attention, head, pixels."""

    works: dict[str, Work] = field(default_factory=dict)

    def add(self, kind: str, operations: float, moved: float) -> None:
        before = self.works.get(kind, Work(0.0, 0.0))
        self.works[kind] = Work(before.operations + operations, before.bytes + moved)

    def seconds(self, machine: Machine) -> float:
        return sum(work.seconds(machine) for work in self.works.values())

    def overlapped(self, machine: Machine) -> float:
        works = self.works.values()
        return Work(sum(w.operations for w in works), sum(w.bytes for w in works)).seconds(machine)


def matmul_flops(device: str, dtype: torch.dtype, clock: Clock = time.perf_counter) -> float:
    """Operations per second of the fastest of several products of large square matrices.

    The better of torch's own product and, on a CPU, of the packed one that the engine uses: a limit that an engine
    beats is none.
    """
    size = 8192 if _is_cuda(device) else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        library = None if _is_cuda(device) else compiled()
        packed = Linear(b, kernels=None if library is None else Kernels(library, dtype))
        seconds = min(_fastest(lambda: torch.mm(a, b), device, clock), _fastest(lambda: packed(a), device, clock))
    return 2 * size**3 / seconds


def bandwidth(device: str, working_set: float | None = None, clock: Clock = time.perf_counter) -> float:
    """Bytes per second of the fastest of several copies and sums, whichever is faster.

    working_set: bytes that they go through, so that a step that fits a CPU's caches is held against the speed of
    those caches. None, or anything large: far more than any cache. A GPU is held against its memory.
    """
    most = 4 * 2**30 if _is_cuda(device) else 2**29
    if working_set is None or _is_cuda(device):
        working_set = most
    source = torch.ones(int(min(most, max(working_set, 2**20))) // 8, device=device)
    target = torch.empty_like(source)
    copied = _fastest(lambda: target.copy_(source), device, clock)
    both = torch.cat([source, target])
    summed = _fastest(lambda: both.sum(), device, clock)
    return 8 * len(source) / min(copied, summed)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _fastest(function: Callable[[], object], device: str, clock: Clock) -> float:
    """Seconds of the fastest of at least five calls, for half a second or more; short calls go in series."""
    synchronise = torch.cuda.synchronize if _is_cuda(device) else lambda: None

    def series(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        synchronise()
        return (clock() - start) / calls

    calls = max(1, int(0.002 / max(series(1), series(1), 1e-7)))
    times, started = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < 0.5:
        times.append(series(calls))
    return min(times)


class Unavoidable:
    """Counts the work of rollouts of one policy.

    phases = Unavoidable(policy).trajectories(rollouts)      # of one batch: {"draw": Phase, ...}
    """

    def __init__(self, policy: JanusPolicy) -> None:
        config = policy.janus.config.text_config
        self.policy, self.templates = policy, policy.templates
        self.layers = config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.wide, self.narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.weights = _parameters(policy.part("language_model").layers)
        self.text_head = _parameters(policy.janus.lm_head)
        self.image_head = _parameters(policy.part("generation_head"))
        self.size = policy.janus.lm_head.weight.element_size()
        model = policy.janus.model
        codes = torch.zeros(1, policy.num_image_tokens, dtype=torch.long, device=policy.device)
        image = torch.zeros(1, policy.image_size, policy.image_size, 3, dtype=torch.uint8, device=policy.device)
        self.pixels = {
            "decode": (_operations(policy.decode_codes, codes), _parameters(model.vqmodel.decoder)),
            "encode": (_operations(policy.encode_pixels, image), _parameters(model.vqmodel.encoder)),
            "see": (
                _operations(policy.embed_pixels, image),
                _parameters(model.vision_model) + _parameters(model.aligner),
            ),
        }

    def working_set(self, rows: int, slots: int) -> float:
        """Bytes that one step of `rows` rows over `slots` slots goes through: weights, half-full cache, head."""
        cache = 2 * self.narrow * self.layers * rows * slots / 2
        return self.size * (self.weights + self.image_head + cache)

    def trajectories(self, rollouts: Sequence[Rollout]) -> dict[str, Phase]:
        """A batch as it came out, for whoever draws an image only where one is needed and keeps what can be kept."""
        sampling = rollouts[0].trajectory.sampling
        per_row = 1 if sampling.guidance == 1.0 else 2
        prompts = [self.templates.prompt(r.trajectory.prompt.text) for r in rollouts]
        length = round(sum(map(len, prompts)) / len(prompts))
        count, look = self.policy.num_image_tokens, len(self.templates.look)
        phases = self.images(len({tuple(p) for p in prompts}), len(rollouts), length, per_row)
        texts = [[s for s in r.trajectory.segments if s.kind == "text"] for r in rollouts]
        spoken = [len(t[0]) for t in texts if t]
        if not spoken:
            return phases
        phases["see pixels"] = self._pixels("see", len(spoken))
        phases["look"] = seen = Phase()
        self._block(seen, len(spoken), count + look, length)
        self._head(seen, self.text_head, len(spoken))
        for step in range(1, max(spoken)):
            rows = sum(words > step for words in spoken)
            self._steps(seen, rows, length + count + look + step)
            self._head(seen, self.text_head, rows)
        again = [t[0] for t, r in zip(texts, rollouts, strict=True) if len(r.images) > 1]
        if not again:
            return phases
        rows, words = per_row * len(again), round(sum(map(len, again)) / len(again))
        between = look + words + len(self.templates.redraw)
        phases["redraw"] = drawn = Phase()
        if sampling.redraw_context == "reencoded":
            phases["encode pixels"] = self._pixels("encode", len(again))
            self._block(drawn, rows, count + between, length)
        else:
            self._block(drawn, rows, 1 + between, length + count - 1)
        self._tokens(drawn, rows, length + count + between)
        phases["decode pixels"] = self._pixels("decode", len(rollouts) + len(again))
        return phases

    def images(self, prompts: int, rows: int, length: int, per_row: int) -> dict[str, Phase]:
        """One image for each of `rows` rows of `prompts` distinct prompts of `length` tokens."""
        phases = {"prompt": Phase(), "draw": Phase(), "decode pixels": self._pixels("decode", rows)}
        self._block(phases["prompt"], per_row * prompts, length, 0)
        self._tokens(phases["draw"], per_row * rows, length)
        return phases

    def _tokens(self, phase: Phase, rows: int, before: int) -> None:
        """An image behind `before` slots: its tokens but the last go through the layers, all through the head."""
        count = self.policy.num_image_tokens
        for step in range(count - 1):
            self._steps(phase, rows, before + step + 1)
        for _ in range(count):
            self._head(phase, self.image_head, rows)

    def _steps(self, phase: Phase, rows: int, slots: int) -> None:
        self._block(phase, rows, 1, slots - 1)

    def _block(self, phase: Phase, rows: int, width: int, before: int) -> None:
        """`width` inputs per row behind `before` slots."""
        phase.add("layers", 2 * self.weights * rows * width, self.weights * self.size)
        seen = before + (width + 1) / 2
        moved = 2 * self.narrow * self.layers * rows * (before + 2 * width) * self.size
        phase.add("attention", 4 * self.wide * self.layers * seen * rows * width, moved)

    def _head(self, phase: Phase, parameters: int, rows: int) -> None:
        phase.add("head", 2 * parameters * rows, parameters * self.size)

    def _pixels(self, what: str, images: int) -> Phase:
        operations, parameters = self.pixels[what]
        phase = Phase()
        phase.add("pixels", operations * images, parameters * self.size)
        return phase


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _operations(function: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(argument)
    return float(counter.get_total_flops())
