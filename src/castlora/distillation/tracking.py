"""Trackers of experiments, which show the losses of a training while it runs."""

import os
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from castlora.config import Tracker
from castlora.errors import UserError

PROJECT = "castlora"
TENSORBOARD_FOLDER = Path("runs")
"""In the working folder, where TensorBoard's own writer puts its files too."""


def check_tracker(tracker: Tracker | None) -> None:
    """Raises a UserError if a tracker is not installed."""
    if tracker is not None and find_spec(tracker) is None:
        raise UserError(f"--report-to {tracker} needs a package that is not installed; pip install {tracker}.")


def tracking(tracker: Tracker | None, run_name: str) -> list[TrainerCallback]:
    """What tells a tracker of a training; what it needs to know beyond that, it reads from its environment variables.

    Args:
        tracker: that is installed, or none
        run_name: names the folder of TensorBoard's files, unless TENSORBOARD_LOGGING_DIR does
    """
    if tracker == "tensorboard" and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(TENSORBOARD_FOLDER / run_name)))]
    callbacks: dict[Tracker | None, list[type[TrainerCallback]]] = {
        None: [],
        "tensorboard": [TensorBoardCallback],
        "trackio": [TrackioCallback],
        "wandb": [WandbCallback],
    }
    return [callback() for callback in callbacks[tracker]]
