"""Which process of a run this is, as `accelerate launch` or `torchrun` says in the environment.

Imports no torch, so that the command line can ask before it reads any data.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from train.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those of its run. Ranks count from 0; `local_rank` on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Self:
        """
        Raises:
            UsageError: a launcher was asked for several processes and started only one.
        """
        # accelerate set MASTER_ADDR without WORLD_SIZE: it started one process.
        uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if uses_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            raise UsageError(
                "accelerate launch --cpu starts one process, whatever --num_processes says: "
                "use torchrun, or accelerate launch --multi_gpu with --device cpu"
            )
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(name, value)) for name, value in defaults.items()))

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def check_single_process(self, command: str) -> None:
        """Refuse a launcher for the commands that do not share their work.

        Raises:
            UsageError: this process is one of several.
        """
        if self.world_size > 1:
            raise UsageError(
                f"{command} cannot run under a launcher of several processes: it needs only one, "
                "or starts its own"
            )


def is_first_to_fail() -> bool:
    """Whether no other process of this run has called this before, so that one error is shown.

    An error that all processes meet is shown once, an error of one process is shown, and the errors
    that its end causes in the others are not.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    # <a folder for this start of the run>/<local rank>/error.json
    claim = Path(error_file).parent.parent / "idspam-failed"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
