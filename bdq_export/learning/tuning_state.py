"""Where the end-to-end stage is: enough to go on after a kill as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdq_export.learning.parameters import Parameters
from bdq_export.resume import ProgressStore, Record

_NAME = "learned-scales"


class TuningState:
    """Parameters, optimizer and schedule, and how the held-out loss went.

    Attributes:
        steps: taken.
        misses: looks at the held-out tokens since the last gain.
        before: held-out loss of the first parameters.
        best: least held-out loss.
        kept: the parameters of that.

    Args:
        parameters: changed by `load`.
        optimizer: an AdamW over them; changed by `load`.
        schedule: of its rate; changed by `load`.
    """

    def __init__(
        self,
        parameters: Parameters,
        optimizer: torch.optim.AdamW,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> None:
        self._parameters, self._optimizer, self._schedule = parameters, optimizer, schedule
        self.steps = self.misses = 0
        self.before = self.best = float("inf")
        self.kept: list[Tensor] = parameters.values()

    def start(self, before: float) -> None:
        """Begin with parameters whose held-out loss is `before`."""
        self.before = self.best = before

    def judge(self, found: float) -> None:
        """Keep the parameters where their held-out loss `found` is the least."""
        if found < self.best:
            self.best, self.kept, self.misses = found, self._parameters.values(), 0
        else:
            self.misses += 1

    def save(self, store: ProgressStore) -> None:
        """Keep all of it."""
        tensors = {f"now:{index}": value for index, value in enumerate(self._parameters.values())}
        tensors |= {f"kept:{index}": value for index, value in enumerate(self.kept)}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer:{index}:{name}": value for name, value in moments.items()}
        values = {"steps": self.steps, "misses": self.misses, "before": self.before, "best": self.best}
        store.save(_NAME, Record(values, tensors))

    def load(self, store: ProgressStore) -> bool:
        """Be as `save` found it; False where the stage is to begin."""
        return store.load(_NAME, self._restore) is not None

    def _restore(self, record: Record) -> bool:
        values, tensors = record.values, record.tensors
        now, kept = (_numbered(tensors, prefix) for prefix in ("now", "kept"))
        shapes = [parameter.shape for parameter in self._parameters]
        for found in (now, kept):
            if [value.shape for value in found] != shapes:
                raise ValueError("other parameters than those of this model")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer:"):
                _, index, what = name.split(":")
                moments.setdefault(int(index), {})[what] = value
        steps = int(values["steps"])
        self.misses, self.before, self.best = int(values["misses"]), float(values["before"]), float(values["best"])
        self._parameters.set_values(now)
        # The rates are functions of the step alone.
        self._schedule.last_epoch = steps
        schedule = self._schedule
        rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        self._schedule._last_lr = rates
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.steps, self.kept = steps, kept
        return True


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    names = [name for name in tensors if name.startswith(f"{prefix}:")]
    return [tensors[f"{prefix}:{index}"] for index in range(len(names))]
