"""The command line, whose training saves every third step and ends after the fourth; started by torchrun."""

import sys
from typing import Any

from forgetcast.__main__ import main
from forgetcast.lm import train

train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
train.STEPS_BETWEEN_LOSSES = 3  # also of the steps at which several processes may save

_on_step_end = train._Progress.on_step_end


def _ending(self: train._Progress, args: Any, state: Any, control: Any, **further: Any) -> None:
    if state.global_step == 4:
        sys.exit(9)
    _on_step_end(self, args, state, control, **further)


train._Progress.on_step_end = _ending  # type: ignore[method-assign]
main()
