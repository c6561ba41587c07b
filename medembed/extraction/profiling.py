"""Where the time of an extraction goes."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field

__all__ = ["STAGES", "Span", "Timeline"]

STAGES = ("prepare", "read", "decode", "starve", "encode", "write")


@dataclass(frozen=True)
class Span:
    """Say what one stage was busy with: `time.monotonic()` at its start and end."""

    stage: str
    start: float
    end: float


@dataclass
class Timeline:
    """Add up how long each stage was busy; keep every span only where a trace is asked for.

    Parameters
    ----------
    keep_spans : bool
        Memory then grows with the number of images.

    Attributes
    ----------
    seconds : dict of str to float
        By one of `STAGES`: `prepare` before the first image; `read` and `decode` summed over the
        decoder processes; `starve` in which the encoder's side waited for images; `encode` in
        which it waited for the encoder; `write` in which the writer's thread was busy.
    """

    keep_spans: bool = False
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, stage: str, start: float, end: float) -> None:
        """Count a span; threads may do so at once."""
        with self._lock:
            self.seconds[stage] += end - start
            if self.keep_spans:
                self.spans.append(Span(stage, start, end))
