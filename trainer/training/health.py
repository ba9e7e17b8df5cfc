"""Early warnings: one line when something starts to go wrong, not one per step, and a stop when training on is a waste."""

from collections import deque
from collections.abc import Callable
from statistics import median

from data.sampling_order import BatchSplit
from trainer.config.schema import HealthSettings


class Health:
    """Watches the metrics lines of a stage. `observe` returns warnings: each one once, when its condition has held for
    `patience` lines, and again only after the condition has been false. What it compares with is part of the run state,
    so that a preemption does not reset it."""

    def __init__(self, settings: HealthSettings, split: BatchSplit):
        self.settings, self.split = settings, split
        self.held: dict[str, int] = {}
        self.skipped_before = 0
        self.skipped_in_a_row = 0
        self.highest_spread = 0.0
        self.lowest: tuple[int | None, float] = (None, float("inf"))  # target node, lowest mismatch on it
        self.paces: deque[float] = deque(maxlen=50)

    def state_dict(self) -> dict:
        own = ("held", "skipped_before", "skipped_in_a_row", "highest_spread", "lowest")
        return {name: getattr(self, name) for name in own} | {"paces": list(self.paces), "split": vars(self.split)}

    def load_state_dict(self, state: dict) -> None:
        for name in ("skipped_before", "skipped_in_a_row"):
            setattr(self, name, state[name])
        self.highest_spread = state.get("highest_spread", 0.0)  # earlier versions compared with the first one
        self.held, self.lowest = dict(state["held"]), tuple(state["lowest"])
        if state["split"] == vars(self.split):  # other processes have another pace
            self.paces.extend(state["paces"])

    def observe(self, line: dict) -> list[str]:
        """line: a metrics line of a logging interval."""
        checks = (
            self._skipping,
            self._still,
            self._collapsed,
            self._diverging,
            self._wrecked,
            self._slow,
            self._waiting,
        )
        return [text for check in checks if (text := check(line))]

    @property
    def hopeless(self) -> bool:
        """Whether so many updates in a row were skipped that the run should stop."""
        return self.skipped_in_a_row >= self.settings.stop_after

    def _once(self, name: str, holds: bool, text: Callable[[], str], patience: int) -> str | None:
        self.held[name] = self.held.get(name, 0) + 1 if holds else 0
        return text() if self.held[name] == patience else None

    def _skipping(self, line: dict) -> str | None:
        total = line.get("skipped_updates") or 0
        new, self.skipped_before = total - self.skipped_before, total
        self.skipped_in_a_row = self.skipped_in_a_row + new if new > 0 else 0
        losses = [k for k in line if k.startswith("loss/") and line[k] is not None and line[k] != line[k]]
        return self._once(
            "skipping",
            new > 0,
            lambda: (
                f"{new} updates were skipped since the last line because a gradient was not finite"
                f"{' (' + ', '.join(losses) + ' is NaN)' if losses else ''}: check the learning rates and the data"
            ),
            1,
        )

    def _still(self, line: dict) -> str | None:
        still = [
            k.partition("/")[2]
            for k in line
            if k.startswith("update_ratio/") and line[k] == 0 and line.get("lr/" + k.partition("/")[2])
        ]
        return self._once(
            "still",
            bool(still),
            lambda: (
                f"the weights of {' and '.join(still)} have not changed since the last line: the learning rate is "
                "too small for the precision, or every update was skipped"
            ),
            1,
        )

    def _collapsed(self, line: dict) -> str | None:
        """The best sign of a bad end in the study (docs/convergence.md)."""
        spread = line.get("sample_spread")
        if spread is None or spread != spread:
            return None
        self.highest_spread = max(self.highest_spread, spread)
        return self._once(
            "collapse",
            spread < self.settings.spread * self.highest_spread,
            lambda: (
                f"the generator's samples differ little from each other (spread {spread:.3g}, at best "
                f"{self.highest_spread:.3g}): it may be collapsing; lower its learning rate or raise fake_updates"
            ),
            self.settings.patience,
        )

    def _diverging(self, line: dict) -> str | None:
        mismatch, node = line.get("mismatch"), line.get("target_node")
        if mismatch is None or mismatch != mismatch:
            return None
        lowest = min(mismatch, self.lowest[1]) if self.lowest[0] == node else mismatch
        self.lowest = node, lowest
        return self._once(
            "diverging",
            mismatch > self.settings.rising * lowest,
            lambda: (
                f"the mismatch has risen to {mismatch:.3g} from {lowest:.3g} on this target: the fake score does not keep "
                "up; raise fake_updates or lower the generator's learning rate"
            ),
            self.settings.patience,
        )

    def _wrecked(self, line: dict) -> str | None:
        """In the study (docs/convergence.md) the mismatch of such a run stayed level, and only this told."""
        error = line.get("fake_score_error")
        if error is None or error != error:
            return None
        return self._once(
            "wrecked",
            error > self.settings.error,
            lambda: (
                f"the fake score's loss is {error:.2f} of what predicting zero would have: it has lost what the teacher knew; "
                "lower backtrack.fake_score.lr and start again"
            ),
            self.settings.patience,
        )

    def _slow(self, line: dict) -> str | None:
        pace = line.get("step_seconds")
        if not pace:
            return None
        usual = median(self.paces) if len(self.paces) >= 5 else pace
        self.paces.append(pace)
        return self._once(
            "slow",
            pace > self.settings.slow * usual,
            lambda: (
                f"steps take {pace:.2f} s, usually {usual:.2f} s: check for a slow node, a throttled GPU or a busy file system"
            ),
            self.settings.patience,
        )

    def _waiting(self, line: dict) -> str | None:
        pace, wait = line.get("step_seconds"), line.get("data_seconds")
        if not pace or wait is None:
            return None
        return self._once(
            "waiting",
            wait > self.settings.waiting * pace,
            lambda: (
                f"{100 * wait / pace:.0f}% of each step is spent waiting for data: raise data.workers or use faster storage"
            ),
            self.settings.patience,
        )
