"""Which process of a run this is, as `accelerate launch` or `torchrun` says it in the environment.

Imports no torch: the command line asks here before it reads any data.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from train.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among its run's. rank: from 0. local_rank: the same on this machine alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Self:
        """
        Raises:
            UsageError: a launcher meant to start several processes and started one.
        """
        if "WORLD_SIZE" not in os.environ and _is_lonely():
            raise UsageError(
                "accelerate launch --cpu starts one process, whatever --num_processes says: "
                "use torchrun, or accelerate launch --multi_gpu with --device cpu"
            )
        return cls(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows what happens."""
        return self.rank == 0

    def check_alone(self, command: str) -> None:
        """For the commands that do not share their work.

        Raises:
            UsageError: this process is one of several.
        """
        if self.size > 1:
            raise UsageError(
                f"{command} is not for a launcher of several processes: it takes one, or starts "
                "those it needs"
            )


def is_first_to_fail() -> bool:
    """Whether no other process of this run has asked before: one tells what went wrong.

    What goes wrong for all of them is said once that way, what goes wrong for one is said, and what
    its end then does to the others is not.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    # <a folder of this start of the run>/<local rank>/error.json
    claim = Path(error_file).parent.parent / "idspam-failed"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def _is_lonely() -> bool:
    """The launcher tells where several would meet, and nobody that there are several."""
    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return uses_cpu and "MASTER_ADDR" in os.environ
