"""What can go wrong for a user, in the user's words; each kind has its exit code.

The command line prints the message of a :class:`DmlbenchError` as one line and exits with its
``exit_code``. Anything else that escapes is a defect of dmlbench, exit code 70.
"""

from typing import NamedTuple


class DmlbenchError(Exception):
    """Base of every error that a user can mend. ``exit_code`` is what the command exits with."""

    exit_code = 2


class UsageError(DmlbenchError):
    """The request itself is wrong: an unknown name, an option out of range. Exit code 2."""


class NoSplit(UsageError):
    """A data set of the user's own has the other split alone."""


class NotComparable(DmlbenchError):
    """Two results cannot be set side by side (other protocol, data set, queries). Exit code 3."""

    exit_code = 3


class DataError(DmlbenchError):
    """Something the request needs is missing, corrupt, or not what it claims. Exit code 4."""

    exit_code = 4


class ShardDone(DmlbenchError):
    """Not a failure: one shard of a run is finished and there is no result before all are. Exit code 0."""

    exit_code = 0


class Interrupted(DmlbenchError):
    """The user stopped a run that can be gone on with. Exit code 130."""

    exit_code = 130


class Problem(NamedTuple):
    """One reason to refuse a submission: at which level, which field of which file, why."""

    level: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"level {self.level}: {self.field}: {self.reason}"
