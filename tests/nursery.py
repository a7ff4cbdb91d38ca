"""Scripts without a fresh interpreter each: a server that has imported everything forks a child for every one.

python nursery.py ADDRESS                     serves
python -IS nursery.py ADDRESS SCRIPT ...      is python SCRIPT ...

The child has the caller's arguments, directory, environment and standard streams, and ends as the script ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys


def call(address: str, arguments: list[str]) -> int:
    """Exit code of ``python ARGUMENTS``, a script's name first, run by the server at ``address``."""
    order = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [b"."], [0, 1, 2])
        line.sendall(json.dumps(order).encode())
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(8)
    return int(answer) if answer else 70  # it was killed


def serve(address: str) -> None:
    """Forks a child for each call, until standard input ends."""
    import gc
    import signal

    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import aq_lightning.cli  # noqa: F401
    import callbacks  # noqa: F401

    gc.collect()
    gc.freeze()  # children collect their own garbage only
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: each says how it ends
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("open", flush=True)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            line, _ = door.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                _live(line)
            line.close()
    os._exit(0)  # frozen objects would be reported as leaks


def _live(line: socket.socket) -> None:
    """A child: becomes the caller's script, and says with which code it ends."""
    code = 1
    try:
        _, streams, *_ = socket.recv_fds(line, 1, 3)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        order = json.loads(b"".join(iter(lambda: line.recv(65536), b"")))
        os.chdir(order["directory"])
        os.environ.clear()
        os.environ.update(order["environment"])
        code = _script(order["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        line.sendall(str(code).encode())
        os._exit(code)


def _script(arguments: list[str]) -> int:
    """Runs it as the interpreter would; its exit code."""
    import atexit
    import runpy

    import torch

    torch.set_num_threads(1)
    sys.stdin = open(0, closefd=False)
    sys.argv, sys.path[0], code = arguments, os.path.dirname(os.path.realpath(arguments[0])), 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    address, *script = sys.argv[1:]
    sys.exit(call(address, script) if script else serve(address))
