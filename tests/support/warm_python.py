"""A Python that has loaded torch and the trainer once, and runs each command in a fork of itself.

Examples are dozens of commands, and each would load torch for seconds. `warm_python` writes an
executable that takes the place of `python`: it hands its arguments, its folder, its environment and
its three streams to the server below, which forks. The fork runs the same module or file in the
same way as `python -m module` or `python file` would, and its exit code is the executable's. It
ends with the executable.

With `EXAMPLE_EPOCHS` in a command's environment, `fit` and `compare` get it as `--epochs` if they
have none.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TREE = Path(__file__).resolve().parents[2]
EPOCHS = "EXAMPLE_EPOCHS"
_TRAININGS = (["train", "fit"], ["train", "compare"])
# What takes long to import. None of them starts a thread or computes anything.
LOADED = (
    "accelerate",
    "transformers.models.bert.modeling_bert",
    "train.fit.fit",
    "train.report.evaluation",
    "service.client",
    "service.http.app",
    "service.local",
)
# Started without site-packages, so in some hundredths of a second.
_EXECUTABLE = """#!{python} -IS
import array, json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
body = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
connection.sendmsg([b"%20d" % len(body)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
connection.sendall(body)
answers = connection.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(process, number))
sys.exit(int(answers.readline()))
"""


@contextmanager
def warm_python(folder: Path, **environment: str) -> Iterator[Path]:
    """The path of an executable that takes the place of `python` until the block ends.

    Args:
        environment: what packages read when they are imported.
    """
    address, executable = folder / "python.sock", folder / "python"
    executable.write_text(_EXECUTABLE.format(python=sys.executable, address=str(address)))
    executable.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm_python", str(address)],
        cwd=TREE,
        # One thread: texts are few, and several examples may run at a time.
        env=os.environ | {"PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield executable
        finally:
            server.kill()


def serve(address: str) -> NoReturn:
    for name in LOADED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Run one command in a fork, and tell its process id and then its exit code."""
    length, streams, _, _ = socket.recv_fds(connection, 20, 3)
    body = connection.makefile("rb").read(int(length))
    arguments, folder, environment = json.loads(body)
    process = os.fork()
    if process == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(_run(arguments))
    connection.sendall(f"{process}\n".encode())
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(process)
    # The executable sends nothing more: there is something to read once it was killed.
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:
        os.kill(process, signal.SIGKILL)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def _run(arguments: Sequence[str]) -> int:
    """What the interpreter does with these arguments: `-m module`, `-c code` or `file`."""
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    epochs = os.environ.get(EPOCHS)
    if epochs and arguments[1:3] in _TRAININGS and "--epochs" not in arguments:
        arguments = [*arguments, "--epochs", epochs]
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            sys.path.insert(0, os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 141
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    serve(sys.argv[1])
