"""Run `medembed` in forks of one process that has its libraries loaded: many runs, one import.

    python preloaded.py SOCKET

Every run is a process of its own, with the arguments, the working directory and the streams of the
one who calls; what libraries read from the environment is the server's.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    *("medembed.autoencoder", "medembed.cli.options", "medembed.doctor"),
    *("medembed.finetuning", "medembed.report.page", "medembed.sweeps"),
    *("transformers.models.resnet.modeling_resnet", "transformers.models.siglip.modeling_siglip"),
)
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([os.getcwd(), *sys.argv[1:]]).encode()
    socket.send_fds(server, [asked], [0, 1, 2])
    sys.exit(int(server.recv(8) or b"70"))
"""


@contextmanager
def commands(directory: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Give a directory whose `medembed` runs in forks of a process of this environment."""
    address = directory / "socket"
    client = directory / "medembed"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    try:
        while not address.exists():
            assert server.poll() is None, "the server ended before it listened"
            time.sleep(0.01)
        yield directory
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Answer one caller after the other, until killed."""
    for name in LIBRARIES:
        __import__(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        os.rename(f"{address}.new", address)
        while True:
            caller, _ = listening.accept()
            with caller:
                asked, streams, _, _ = socket.recv_fds(caller, 1 << 16, 3)
                child = os.fork()
                if not child:
                    run_once(json.loads(asked), streams)
                for stream in streams:
                    os.close(stream)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                caller.sendall(str(status % 256).encode())


def run_once(asked: list[str], streams: list[int]) -> None:
    """Be the command: never returns."""
    from medembed.__main__ import run

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Those that Python has opened know of the server's whether one can seek in them.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.chdir(asked[0])
    sys.argv = ["medembed", *asked[1:]]
    status = 70
    try:
        run()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
