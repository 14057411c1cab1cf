"""The sandbox: right and wrong programs, and hostile ones, which must get nowhere while the caller lives on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from folora.errors import FoLoRAError
from folora.sandbox import Limits, describe_sandbox, passes

FEW = Limits(seconds=1, wall_seconds=4)


def fails(code: str) -> str:
    """A program that passes if the code raises an OSError, a MemoryError or, for want of a thread, a RuntimeError."""
    body = "".join(f"    {line}\n" for line in dedent(code).strip().splitlines())
    refused = "except (OSError, MemoryError, RuntimeError):\n    pass\n"
    return f"import os\ntry:\n{body}{refused}else:\n    raise SystemExit\n"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def add(a, b):\n    return a + b\nassert add(2, 3) == 5", True),
        ("import math, heapq, ctypes, sqlite3\nassert heapq.nlargest(1, [1, math.e]) == [math.e]", True),
        ("open('notes', 'w').write('x' * 1000)\nassert len(open('notes').read()) == 1000", True),
        ("if __name__ == '__main__':\n    input()", True),
        ("def add(a, b):\n    return a * b\nassert add(2, 3) == 5", False),
        ("def add(a, b:", False),
        ("assert 'ä\\0' == 'ä", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("import os; os.write(3, b'started ' + b'0' * 64); os._exit(0)", False),
        ("import numpy", False),
        ("import folora", False),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(program: str, expected: bool) -> None:
    assert passes(program) is expected


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        f"os.listdir({str(Path.home())!r})",
        f"os.stat({str(Path(__file__).parent.parent)!r})",
        "os.listdir('/proc')",
        "open('/dev/zero')",
        "open('/note', 'w')",
        "open('/python/lib/note', 'w')",
        "open('/sandboxed.py', 'a')",
        "os.mkdir('/dev/shm')",
        "open('much', 'wb').write(bytes(100 << 20))",
        "[open(str(i), 'wb').write(bytes(3 << 20)) for i in range(100)]",
        "bytearray(10 << 30)",
        "[os.dup(0) for _ in range(100)]",
        "import threading, time\n[threading.Thread(target=time.sleep, args=(1,)).start() for _ in range(100)]",
        "os.setuid(0)\nos.mkdir('/root/x')",
        "os.kill(TESTS, 9)",
    ],
)
def test_what_is_outside_or_too_much_cannot_be_had(code: str) -> None:
    assert passes(fails(code.replace("TESTS", str(os.getpid()))), FEW)


@pytest.mark.usefixtures("sandbox")
def test_no_socket_reaches_a_server_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        assert passes(fails(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.usefixtures("sandbox")
def test_secrets_of_the_environment_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert passes("import os\nassert 'very_secret' not in str(os.environ)\nassert 'HOME' not in os.environ")


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "while True: print('x' * 100000)",
        "import os\nwhile True: os.write(3, bytes(100000))",
        "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)\nos.kill(-1, 9)\nos.kill(0, 9)",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nraise SystemExit",
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_what_does_not_end_is_ended(program: str) -> None:
    """Within the limits, with nothing left of it."""
    begun = time.monotonic()
    assert not passes(program, FEW)
    assert time.monotonic() - begun < FEW.wall_seconds + 30  # a machine may be busy
    assert str(os.getpid()) not in _parents_of("bwrap")


def _parents_of(command: str) -> list[str]:
    """Parents of the processes of a name."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue  # it has ended
        if name.endswith(f"({command}"):
            found.append(rest.split()[1])
    return found


@pytest.mark.usefixtures("sandbox")
def test_a_program_ends_with_its_caller(tmp_path: Path) -> None:
    source = "from folora.sandbox import passes; passes('import time; time.sleep(1000)')"
    caller = subprocess.Popen([sys.executable, "-c", source], cwd=tmp_path)
    while str(caller.pid) not in _parents_of("bwrap"):
        assert caller.poll() is None
        time.sleep(0.1)
    running = len(_parents_of("bwrap"))
    caller.kill()
    caller.wait()
    while len(_parents_of("bwrap")) >= running:  # what else is tested here starts none
        time.sleep(0.1)


@pytest.mark.usefixtures("sandbox")
def test_the_description_names_program_and_limits() -> None:
    described = describe_sandbox()
    assert described["sandbox"].startswith("bubblewrap ")
    assert described["limits"]["processes"] == Limits().processes


def test_nothing_runs_without_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FoLoRAError, match=r"run_generated_code: needs bubblewrap, .* apt-get install bubblewrap"):
        passes("")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: no permission to create a namespace\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(FoLoRAError, match="can make no sandbox here: bwrap: no permission"):
        passes("")
