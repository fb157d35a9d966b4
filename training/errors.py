"""What went wrong and is not our own bug: a user's to mend, or the system's refusal."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Something the user can mend. The message names the file, the value and the remedy, in one
    line."""

    told = False  # whether another process says so


# What the system refused to do, by the number of its error: every command says so in one line.
DEEDS = {
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG),
    "open": (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}
