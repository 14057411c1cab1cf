"""What runs inside the sandbox: lower the limits for good, run a program, and say that it came to its end.

It stands alone: the sandbox has Python's standard library and this file. Started by ``sandbox.py`` with the limits as
JSON; the first line of its input is a token. It says that it starts, and once the rest of the input has run without an
error, the token.
"""

import json
import os
import resource
import sys
from typing import IO

NOBODY = 65534
STARTED = "started "  # before the token


def run(limits: dict[str, int], source: IO[bytes]) -> None:
    """Run a program, in the globals that HumanEval's own harness gives it: what a main guard keeps is not run.

    Args:
        limits: of ``resource``, by name.
        source: the token in a line, then the program.
    """
    token, program = source.readline().strip(), source.read()
    said = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if os.getuid() == 0:  # root's processes are not counted
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.write(said, STARTED.encode())
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(said, token)
    os._exit(0)  # threads that it left do not hold it up


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), sys.stdin.buffer)
