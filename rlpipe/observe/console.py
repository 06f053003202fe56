"""A run in the terminal: a live view on a terminal, plain aligned lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
SEGMENTS = ("first", "reflection", "final")
MODES = ("auto", "plain", "off")
_HISTORY = 30
_RECENT_STEPS = 20
_HEADER_EVERY = 20
_MAX_BAR = 20
_NAME_WIDTH = 17


def sparkline(values, width: int = _HISTORY) -> str:
    """The last `width` values as block characters, scaled to their own range."""
    values = list(values)[-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """ "42 s", "3:07" or "1:02:45"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number(value: float | None) -> str:
    """At most seven characters or so: 0.512, 85.3, 3, 2.1e-06; "-" for a missing value."""
    if value is None:
        return "-"
    if float(value).is_integer() and abs(value) < 1e5:
        return str(int(value))
    size = abs(value)
    return f"{value:.1e}" if size < 1e-3 or size >= 1e5 else f"{value:.3f}" if size < 10 else f"{value:.1f}"


def groups(metrics: Mapping[str, float]) -> dict[str, list[str]]:
    """Names of the metrics that are shown, in the groups and the order in which both views show them."""
    rewards = [f"reward/{segment}/mean" for segment in SEGMENTS if f"reward/{segment}/mean" in metrics]
    rewards = rewards or [name for name in metrics if name.startswith("reward/") and name.endswith("/mean")]
    if not rewards:
        rewards = [name for name in metrics if name.startswith("loss/") and name != "loss/total"]
        rewards = ["loss/total", *rewards] if "loss/total" in metrics else rewards
    kl = [name for name in metrics if name.startswith("kl/")]
    policy = [
        "rollout/share_yes",
        *kl,
        "mismatch/max_abs",
        "train/grad_norm",
        "train/lr",
        "rollout/images_per_s",
    ]
    return {
        "rewards" if any(name.startswith("reward/") for name in rewards) else "losses": rewards,
        "policy": [name for name in policy if name in metrics],
        "seconds": [name for name in metrics if name.startswith("time/")],
        "idle": [name for name in metrics if name.startswith("idle/")],
        "failures": [name for name, value in metrics.items() if name.startswith("failures/") and value],
    }


class RunView:
    """Shows one step after the other.

    with RunView("auto", total_steps=120, title="runs/tiny_grpo") as view:
        view.say("warming up")                      # a line above the live view
        view.step(1, {"reward/first/mean": 0.5, "time/learn": 1.2, ...})
        view.progress("evaluating SFT", 200, 600)   # a stage without steps
    """

    def __init__(
        self,
        mode: str = "auto",
        total_steps: int = 0,
        title: str = "",
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"observe.terminal: {mode!r} is none of {', '.join(MODES)}")
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.mode = "live" if mode == "auto" and self.console.is_terminal else "off" if mode == "off" else "plain"
        self.total_steps, self.title, self._clock = total_steps, title, clock
        self._step, self._metrics = first_step, {}
        self._finished = deque([clock()], maxlen=_RECENT_STEPS + 1)
        self._rewards: dict[str, deque[float]] = {}
        self._header: list[str] = []
        self._lines = 0
        self._stage = ""
        self._live: Live | None = None

    def __enter__(self) -> RunView:
        if self.mode == "live":
            self._live = Live(self.render(), console=self.console, auto_refresh=False, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line of plain text."""
        if self.mode != "off":
            self.console.print(Text(text))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a finished step (counted from 1)."""
        self._finished.append(self._clock())
        self._step, self._metrics, self._stage = step, dict(metrics), ""
        for name in groups(metrics).get("rewards", []):
            self._rewards.setdefault(name, deque(maxlen=_HISTORY)).append(metrics[name])
        if self.mode == "plain":
            self._print_line()
        self._refresh()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; plain output gets a line at the end and at each quarter."""
        self._stage = f"{stage}: {done}/{total}"
        if self.mode == "plain" and (done == total or 4 * done // total > 4 * (done - 1) // total):
            self.say(self._stage)
        self._refresh()

    @property
    def seconds_left(self) -> float | None:
        """From the mean of the last steps; None before the first."""
        steps = len(self._finished) - 1
        if not steps or not self.total_steps:
            return None
        return (self._finished[-1] - self._finished[0]) / steps * (self.total_steps - self._step)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self.render(), refresh=True)

    # plain lines

    def _print_line(self) -> None:
        shown = [name for names in groups(self._metrics).values() for name in names]
        if not set(shown) <= set(self._header) or self._lines % _HEADER_EVERY == 0:
            self._header += [name for name in shown if name not in self._header]
            self._print_header()
        self._lines += 1
        left = self.seconds_left
        cells = [number(self._metrics.get(name)).rjust(_width(name)) for name in self._header]
        progress = f"{self._step}/{self.total_steps}"
        self._plain("  ".join([progress.rjust(9), ("-" if left is None else duration(left)).rjust(7), *cells]))

    def _print_header(self) -> None:
        """Two lines: the first part of each name over its first column, the rest below."""
        above, below, previous = [" " * 18], ["step".rjust(9), "left".rjust(7)], ""
        for name in self._header:
            group, _, rest = _short(name).rpartition("/")
            above.append(("" if group == previous else group).ljust(_width(name))[: _width(name)])
            below.append(rest.rjust(_width(name)))
            previous = group
        self._plain("  ".join(above).rstrip())
        self._plain("  ".join(below))

    def _plain(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    # live view

    def render(self) -> Panel:
        """The whole view."""
        shown = groups(self._metrics)
        parts: list = [self._progress_row()]
        if self._metrics:
            body = Table.grid(padding=(0, 5, 1, 0))
            body.add_row(self._reward_table(shown), self._policy_table(shown))
            body.add_row(self._bar_table("seconds", shown["seconds"]), self._bar_table("idle", shown["idle"]))
            parts += ["", body]
        if self._stage:
            parts += ["", Text(self._stage, style="cyan")]
        return Panel(
            Group(*parts),
            title=Text(self.title or "rlpipe", style="bold"),
            title_align="left",
            padding=(1, 2),
        )

    def _progress_row(self) -> Table:
        left = self.seconds_left
        row = Table.grid(expand=True, padding=(0, 2))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self._step, complete_style="cyan")
        eta = "" if left is None else f"{duration(left)} left"
        row.add_row(Text(f"step {self._step}/{self.total_steps}", style="bold"), bar, eta)
        return row

    def _reward_table(self, shown: dict[str, list[str]]) -> Table:
        title = next(iter(shown))
        table = _section(title)
        for name in shown[title]:
            line = sparkline(self._rewards.get(name, ()))
            table.add_row(_short(name), number(self._metrics[name]), Text(line, style="green"))
        return table

    def _policy_table(self, shown: dict[str, list[str]]) -> Table:
        table = _section("policy")
        for name in shown["policy"]:
            table.add_row(_short(name), number(self._metrics[name]), "")
        for name in shown["failures"]:
            table.add_row(Text(_short(name), style="red"), number(self._metrics[name]), "")
        return table

    def _bar_table(self, group: str, names: list[str]) -> Table:
        title = "seconds by phase" if group == "seconds" else "idle share by role"
        table = _section(title if names else "")
        values = {name: self._metrics[name] for name in names}
        full = 1.0 if group == "idle" else max(values.values(), default=1.0) or 1.0
        for name, value in values.items():
            length = round(_MAX_BAR * min(value / full, 1.0))
            table.add_row(
                _short(name),
                number(value),
                Text("━" * length, style="blue" if group == "seconds" else "yellow"),
            )
        return table


def _section(title: str) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=_NAME_WIDTH)
    table.add_column(justify="right", no_wrap=True, min_width=8)
    table.add_column(no_wrap=True)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    return table


def _short(name: str) -> str:
    """A metric's name without the part that its neighbours make clear: reward/first/mean -> reward/first."""
    return name.removesuffix("/mean")


def _width(name: str) -> int:
    group, _, rest = _short(name).rpartition("/")
    return max(len(group), len(rest), 7)
