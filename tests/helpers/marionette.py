"""Firefox by its own remote control, Marionette, which needs neither a driver nor a library."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

FIREFOX = shutil.which("firefox") or shutil.which("firefox-esr")
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Shift": "\ue008", "End": "\ue010", "Home": "\ue011",
        "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
        "PageUp": "\ue00e", "Backspace": "\ue003"}  # fmt: skip
SETTINGS = {"marionette.port": 0, "browser.shell.checkDefaultBrowser": False,
            "datareporting.policy.dataSubmissionEnabled": False,
            "browser.startup.homepage_override.mstone": "ignore",
            "network.captive-portal-service.enabled": False,
            "network.connectivity-service.enabled": False}  # fmt: skip
RESIZE = """const [width, height] = arguments;
const style = gBrowser.selectedBrowser.style;
for (const kind of ["min", "max"]) {
  style.setProperty(`${kind}-width`, `${width}px`, "important");
  style.setProperty(`${kind}-height`, `${height}px`, "important");
}"""
TROUBLES = """return Services.console.getMessageArray()
  .filter((m) => m instanceof Ci.nsIScriptError && m.sourceName.startsWith("file:"))
  .map((m) => m.message)"""


class Firefox:
    """A Firefox without a window on the screen, with a profile of its own."""

    def __init__(self, home: Path) -> None:
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in SETTINGS.items()]
        (home / "user.js").write_text("\n".join(lines))
        words = [str(FIREFOX), "--headless", "--no-remote", "--marionette"]
        words += ["--remote-allow-system-access", "--profile", str(home)]
        self._process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._number = 0
        port = self._wait_for_port(home / "MarionetteActivePort")
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._stream = self._socket.makefile("rb")
        self._read()
        self.version = self.ask("WebDriver:NewSession")["capabilities"]["browserVersion"]
        self.ask("WebDriver:SetWindowRect", width=1600, height=1200)

    def _wait_for_port(self, path: Path) -> int:
        for _ in range(600):
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text())
            if self._process.poll() is not None:
                raise RuntimeError(f"{FIREFOX} ended with {self._process.returncode}")
            time.sleep(0.05)
        raise RuntimeError(f"{FIREFOX} opened no port within 30 seconds")

    def _read(self):
        size = b""
        while (character := self._stream.read(1)) != b":":
            size += character
        return json.loads(self._stream.read(int(size)))

    def ask(self, command, **parameters):
        """Send a command of WebDriver and return what it gives."""
        self._number += 1
        message = json.dumps([0, self._number, command, parameters]).encode()
        self._socket.sendall(f"{len(message)}:".encode() + message)
        _, _, error, result = self._read()
        if error is not None:
            raise RuntimeError(f"{command}: {error['error']}: {error['message']}")
        return result

    def run(self, script, *args):
        """Return the value of a script's `return`."""
        found = self.ask("WebDriver:ExecuteScript", script=script, args=args, newSandbox=False)
        return found["value"]

    def _run_in_browser(self, script, *args):
        self.ask("Marionette:SetContext", value="chrome")
        try:
            return self.run(script, *args)
        finally:
            self.ask("Marionette:SetContext", value="content")

    def open(self, path, width, height):
        """Open a file in a viewport of this size, with nothing in the console."""
        self._run_in_browser("Services.console.reset()")
        self._run_in_browser(RESIZE, width, height)
        self.ask("WebDriver:Navigate", url=path.as_uri())

    def troubles(self):
        """Return what pages have written to the console of errors and warnings."""
        return self._run_in_browser(TROUBLES)

    def wait_for(self, script, *args, timeout=5):
        """Wait until a script returns something true."""
        deadline = time.monotonic() + timeout
        while not (found := self.run(script, *args)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: {script}")
            time.sleep(0.05)
        return found

    def keys(self, *keys, held=None):
        """Press keys one after the other, each a name of `KEYS` or a character."""
        pressed = [
            {"type": kind, "value": KEYS.get(key, key)}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        if held:
            down, up = ({"type": kind, "value": KEYS[held]} for kind in ("keyDown", "keyUp"))
            pressed = [down, *pressed, up]
        self.ask(
            "WebDriver:PerformActions",
            actions=[{"type": "key", "id": "keyboard", "actions": pressed}],
        )

    def pointer(self, *points, drag=False):
        """Move the mouse through points of the viewport; press it at the first with `drag`."""
        moves = [
            {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0} for x, y in points
        ]
        if drag:
            down, up = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
            moves = [moves[0], down, *moves[1:], up]
        self.ask(
            "WebDriver:PerformActions",
            actions=[
                {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"},
                 "actions": moves}
            ],
        )  # fmt: skip

    def screenshot(self):
        """Return the viewport as PNG in base64."""
        return self.ask("WebDriver:TakeScreenshot", full=False)["value"]

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self.ask("Marionette:Quit", flags=["eForceQuit"])
        self._stream.close()
        self._socket.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
