"""Ctrl-C and SIGTERM: what is embedded is committed, and the command says so."""

import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import slow_files
from made_extraction import HalvesEncoder, write_images
from PIL import Image

from medembed.cache.store import open_cache
from medembed.dataset.manifest import write_manifest
from medembed.extraction import decode_pool, extract
from medembed.extraction.decode_pool import Decoders
from medembed.images.load import DEFAULT_LIMITS, Content, Limits, Reading

HELPERS = Path(__file__).parents[1] / "helpers"
BLACK = np.zeros((1, 1), np.uint8)

# `medembed extract` as its entry point runs it, with an encoder that is slow and says where it is.
COMMAND = """
    import sys, time
    from pathlib import Path

    sys.path.insert(0, {helpers!r})
    from made_extraction import HalvesEncoder

    from medembed.__main__ import run
    from medembed.encoders import loading

    class Slow(HalvesEncoder):
        def encode(self, pixels, poolings):
            time.sleep(0.05)
            rows = super().encode(pixels, poolings)
            if len(self.shapes) >= 12:  # five canaries and some batches
                Path({marker!r}).touch()
            return rows

    loading.load_encoder = lambda *_, **__: Slow()
    run()
"""


@pytest.fixture
def started(tmp_path: Path) -> subprocess.Popen[str]:
    """Start extracting 240 images, and wait until some of them are embedded."""
    write_manifest(write_images(tmp_path / "images", 240), tmp_path / "manifest.csv")
    marker = tmp_path / "marker"
    script = textwrap.dedent(COMMAND.format(helpers=str(HELPERS), marker=str(marker)))
    arguments = ["extract", "manifest.csv", "--image-root", "images", "--encoder", "slow"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--cache", "cache", "--batch-size", "4"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not marker.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process


def finish(tmp_path: Path) -> int:
    """Embed the rest; give how many images were there already."""
    manifest = write_images(tmp_path / "images", 240)
    report = extract(manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "cache")
    assert (report.failed, report.already + report.embedded) == (0, 240)
    assert open_cache(tmp_path / "cache").verify() == []
    return report.already


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "Interrupted"),
        (signal.SIGTERM, "Terminated"),
        (signal.SIGHUP, "Hung up"),
    ],
)
def test_a_signal_commits_what_is_embedded_and_says_so(
    number: signal.Signals, word: str, started: subprocess.Popen[str], tmp_path: Path
) -> None:
    started.send_signal(number)
    _, messages = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    [line] = [line for line in messages.splitlines() if word in line]
    n_already = finish(tmp_path)
    assert 0 < n_already < 240
    assert f"{n_already} images of this run are in the cache." in line
    assert "Traceback" not in messages


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_repeated_signal_does_not_stop_the_commit(
    number: signal.Signals, started: subprocess.Popen[str], tmp_path: Path
) -> None:
    while started.poll() is None:
        started.send_signal(number)
        time.sleep(0.001)
    _, messages = started.communicate()
    assert started.returncode == 128 + number
    assert f"{finish(tmp_path)} images of this run" in messages


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    script = "import signal\nfrom medembed.cli.console import terminate_cleanly\n"
    script += "terminate_cleanly()\nprint(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    command = ["nohup", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "True\n"


def test_a_signal_long_after_the_first_ends_the_command_at_once() -> None:
    script = """
        import os, signal, time
        from medembed.cli import console

        console.PATIENCE_SECONDS = 0.05
        console.terminate_cleanly()
        for seconds in (0, 0, 0.1):
            time.sleep(seconds)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                print("goes on", flush=True)
            except KeyboardInterrupt:
                print("told", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "told\ngoes on\n")


def test_a_signal_within_a_finalizer_is_not_lost() -> None:
    script = """
        import os, signal, time
        from medembed.cli import console

        class Slow:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                print("goes on", flush=True)

        console.terminate_cleanly()
        try:
            Slow()
            for _ in range(100):
                time.sleep(0.1)
        except console.Terminated as told:
            print(told.number)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{int(signal.SIGTERM)}\n", "")


def test_a_terminal_that_is_closed_commits_what_is_embedded(tmp_path: Path) -> None:
    write_manifest(write_images(tmp_path / "images", 240), tmp_path / "manifest.csv")
    marker = tmp_path / "marker"
    script = textwrap.dedent(COMMAND.format(helpers=str(HELPERS), marker=str(marker)))
    arguments = ["extract", "manifest.csv", "--image-root", "images", "--encoder", "slow"]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        arguments += ["--cache", "cache", "--batch-size", "4"]
        os.execv(sys.executable, [sys.executable, "-c", script, *arguments])
    while not marker.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 4096)
    os.close(terminal)  # what closing a window or losing a connection does
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert 0 < finish(tmp_path) < 240


@pytest.fixture
def slow_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Content, Path]:
    """Make an image that decoders read only when a file beside it says so."""
    write_images(tmp_path / "slow", 1)
    [path] = (tmp_path / "slow").iterdir()
    slow_files.hold(path, tmp_path / "site", monkeypatch)
    return Content(hashlib.sha256(path.read_bytes()).hexdigest(), (path.name,)), path


def signalled(
    slow_image: tuple[Content, Path], number: signal.Signals, times: int
) -> tuple[Reading, set[int]]:
    """Read an image by one decoder process that is sent a signal while it is at it, `times` times.

    Gives the reading and the processes that were at it.
    """
    content, path = slow_image
    pids: set[int] = set()
    with Decoders(1, HalvesEncoder().preprocessing) as decoders:
        for pair in decoders.read([content], path.parent, 1):
            if pair is not None:
                return pair[1], {*pids, decoders._all[0]._process.pid}
            process = decoders._all[0]._process
            if process.pid not in slow_files.begun(path) - pids:
                continue
            if times:
                times -= 1
                os.kill(process.pid, number)
                pids.add(process.pid)
                if number == signal.SIGKILL:
                    process.wait()
            if not times or number != signal.SIGKILL:
                slow_files.release(path)
    raise AssertionError("the image was never read")


def test_a_decoder_that_is_told_to_end_finishes_its_image(slow_image: tuple[Content, Path]) -> None:
    reading, pids = signalled(slow_image, signal.SIGTERM, 1)
    assert reading.pixels is not None
    assert len(pids) == 1


def test_an_image_whose_decoder_was_killed_is_read_again(slow_image: tuple[Content, Path]) -> None:
    reading, pids = signalled(slow_image, signal.SIGKILL, 1)
    assert reading.pixels is not None
    assert len(pids) == 2


def test_an_image_whose_decoder_is_killed_twice_is_left_to_the_next_run(
    slow_image: tuple[Content, Path],
) -> None:
    reading, pids = signalled(slow_image, signal.SIGKILL, 2)
    assert (reading.stage, len(pids)) == ("read", 2)
    assert "SIGKILL" in reading.reason


def read_by_one(contents: list[Content], root: Path, limits: Limits) -> tuple[list[Reading], int]:
    """Read by one decoder; also give how many processes it took."""
    pids, readings = set(), []
    with Decoders(1, HalvesEncoder().preprocessing, limits=limits) as decoders:
        for pair in decoders.read(contents, root, 1):
            pids.add(decoders._all[0]._process.pid)
            if pair is not None:
                readings.append(replace(pair[1], pixels=None if pair[1].pixels is None else BLACK))
    return readings, len(pids)


def test_an_image_that_computes_too_long_fails_and_the_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "MAX_DEATHS", 1)  # the decoder is not to blame
    write_images(tmp_path, 2)
    large = tmp_path / "large.png"
    pixels = np.zeros((8_000, 9_900), np.uint8)
    pixels[4_000, 0] = 1
    Image.fromarray(pixels).save(large, compress_level=1)
    paths = [large, *sorted(path for path in tmp_path.iterdir() if path != large)]
    contents = [Content(hashlib.sha256(p.read_bytes()).hexdigest(), (p.name,)) for p in paths]
    contents = [contents[1], contents[0], contents[2]]
    readings, n_processes = read_by_one(contents, tmp_path, Limits(max_seconds=0.1))
    assert [reading.stage for reading in readings] == [None, "decode", None]
    assert "more than 0.1 seconds of computing to decode (--max-seconds)" in readings[1].reason
    assert n_processes == 2
    assert [r.stage for r in read_by_one(contents, tmp_path, DEFAULT_LIMITS)[0]] == [None] * 3


def test_a_disk_that_does_not_answer_is_tried_again_by_the_next_run(
    slow_image: tuple[Content, Path],
) -> None:
    content, path = slow_image
    readings, _ = read_by_one([content], path.parent, Limits(max_seconds=0.02))
    assert readings[0].stage == "read"
    assert "more than 0.2 seconds to read" in readings[0].reason


def test_decoders_end_with_a_process_that_is_killed(slow_image: tuple[Content, Path]) -> None:
    content, path = slow_image
    script = f"""
        import sys
        from pathlib import Path

        sys.path[:0] = {[str(HELPERS), str(path.parents[1] / "site")]!r}
        from made_extraction import HalvesEncoder

        from medembed.images.load import Content
        from medembed.extraction.decode_pool import Decoders

        with Decoders(1, HalvesEncoder().preprocessing) as decoders:
            content = Content({content.sha256!r}, {content.images!r})
            list(decoders.read([content], Path({str(path.parent)!r}), 1))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    while not (begun := slow_files.begun(path)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (pid,) = begun
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
