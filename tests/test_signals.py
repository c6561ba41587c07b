"""Ctrl-C and SIGTERM: what is embedded is committed, and the command says so."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_extraction import HalvesEncoder, write_images

from medembed.cache.store import open_cache
from medembed.dataset.manifest import write_manifest
from medembed.dataset.reading import Content, Reading
from medembed.extraction import extract
from medembed.extraction.decoding import Decoders

# `medembed extract` as its entry point runs it, with an encoder that is slow and says where it is.
COMMAND = """
    import sys, time
    from pathlib import Path

    sys.path.insert(0, {tests!r})
    from test_extraction import HalvesEncoder

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
    script = textwrap.dedent(COMMAND.format(tests=str(Path(__file__).parent), marker=str(marker)))
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
    ("number", "word"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated")]
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


def test_a_repeated_sigterm_does_not_stop_the_commit(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    while started.poll() is None:
        started.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    _, messages = started.communicate()
    assert started.returncode == 128 + signal.SIGTERM
    assert f"{finish(tmp_path)} images of this run" in messages


@pytest.fixture
def slow_image(tmp_path: Path) -> tuple[Content, Path]:
    """Make an image that can only be read once somebody writes it: a pipe with a name."""
    write_images(tmp_path, 1)
    [path] = tmp_path.iterdir()
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    (tmp_path / "bytes").write_bytes(data)
    return Content(hashlib.sha256(data).hexdigest(), (path.name,)), path


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
            try:  # as soon as it opens the pipe to read, but no sooner, it opens to be written
                end = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                continue
            if times:
                times -= 1
                process = decoders._all[0]._process
                os.kill(process.pid, number)
                pids.add(process.pid)
                if number == signal.SIGKILL:
                    process.wait()
            if not times or number != signal.SIGKILL:
                with contextlib.suppress(BrokenPipeError):
                    os.write(end, (path.parent / "bytes").read_bytes())
            os.close(end)
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
