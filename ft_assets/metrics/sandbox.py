"""Limit this process, then become the user's program: `python -I sandbox.py <limits> <command>`.

The limits are memory in bytes, CPU time in seconds, and the size of a file in bytes. The network is
taken away where Linux lets a user make a network namespace of their own. Uses the standard library
alone, because it runs before the program in the same process.
"""

import ctypes
import os
import resource
import sys

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # linux/sched.h
NO_NEW_PRIVILEGES = 38  # linux/prctl.h: no setuid program gets more rights


def main() -> None:
    memory, seconds, size, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.unshare(NEW_USER | NEW_NETWORK)
    limits = {
        resource.RLIMIT_AS: int(memory),
        resource.RLIMIT_CPU: int(seconds),
        resource.RLIMIT_FSIZE: int(size),
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
