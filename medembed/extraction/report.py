"""The outcome of an extraction: what became of the manifest's rows, and where the time went."""

from collections import Counter
from dataclasses import asdict, dataclass

from medembed.core.system import count_cores
from medembed.core.text import Summarised, Summary, count_values, counted
from medembed.encoders.protocol import DescribedEncoder, Encoder, EncoderExecution

__all__ = ["ExtractionReport", "describe_execution", "describe_times", "execution_of"]

STARVING = 0.1  # share of the time waiting for images above which advice is printed


@dataclass(frozen=True, repr=False)
class ExtractionReport(Summarised):
    """Counts of what became of a manifest's rows.

    Always requested = already + embedded + failed + duplicates.

    Parameters
    ----------
    requested : int
        Rows of the manifest.
    already, embedded, failed : int
        Distinct contents that were in the cache before, were added (in a dry run: would be
        tried), or could not become a row.
    duplicates : int
        Rows whose content also belongs to an earlier row.
    colour : int
        Embedded images whose colour was reduced to luminance.
    notes : dict of str to int
        What was ignored in embedded images as implausible, such as an orientation or a window,
        and in how many.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each image whose content failed: more than `failed`
        where a content has several names.
    seconds : float
        From start to end, without loading the encoder.
    images_per_second : float
        `embedded` divided by `seconds`.
    batch_size, decoders : int
        Final number of images per pass of the encoder; number of decoder processes. 0 if there
        was nothing to do.
    stages : dict of str to float
        Seconds: `read` and `decode`, summed over the decoder processes; `starve`, waiting for
        images; `encode`, waiting for the encoder; `write`, in which the writer was busy in
        parallel; `prepare`, before the first image (warm-up and canary).
    execution : EncoderExecution or None
        How the encoder ran; None if nothing was embedded, or by several workers.
    canary : float or None
        Largest distance of a canary image from its embedding in the cache, as a fraction of the
        median distance between canaries; None if nothing was embedded or the cache has no canary.
    """

    requested: int
    already: int
    embedded: int
    failed: int
    duplicates: int
    colour: int
    notes: dict[str, int]
    failures: list[dict[str, str]]
    seconds: float
    images_per_second: float
    batch_size: int
    decoders: int
    stages: dict[str, float]
    canary: float | None
    execution: EncoderExecution | None = None

    def summarise(self) -> Summary:
        """Return what became of the images, why some failed, and how fast it was."""
        stages = Counter(failure["stage"] for failure in self.failures)
        failed = f" (in {count_values(stages)}; see .failures)" if stages else ""
        return Summary(
            f"Extraction: {self.embedded:,} of {counted(self.requested, 'image')} embedded",
            {
                "in the cache before": f"{self.already:,}",
                "the same bytes again": f"{self.duplicates:,}",
                "failed": f"{self.failed:,}{failed}",
                "time": f"{self.seconds:.1f} s, {self.images_per_second:.1f} images/s",
            },
        )

    def as_dict(self) -> dict[str, object]:
        """Return the counts as JSON-able values."""
        return asdict(self)


def execution_of(encoder: Encoder) -> EncoderExecution:
    """Return how an encoder runs, in the form of `ExtractionReport.execution`."""
    if isinstance(encoder, DescribedEncoder):
        return encoder.describe()
    return {
        "device": encoder.device,
        "card": None,
        "precision": encoder.precision,
        "attention": None,
        "compiled": False,
    }


def describe_execution(source: str, execution: EncoderExecution, batch_size: int) -> str:
    """Return a sentence on the encoder, device and settings; on a CPU also why no GPU is used."""
    card = f" ({execution['card']})" if execution["card"] else ""
    parts = [f"{source} on {execution['device']}{card} in {execution['precision']}"]
    parts.append(f"batches of {batch_size}")
    if execution["attention"]:
        parts.append(f"{execution['attention']} attention")
    if execution["device"] == "cuda":
        parts.append("compiled" if execution["compiled"] else "not compiled")
    text = f"Encoder: {', '.join(parts)}."
    if execution["device"] == "cpu":
        from medembed.encoders.devices import why_no_gpu

        found = why_no_gpu()
        if found is not None:
            reason, remedy = found
            text += f" There is an NVIDIA GPU that is not used: {reason}. {remedy}"
    return text


def describe_times(report: ExtractionReport) -> str:
    """Return a line that shows where the time went and what would shorten it."""
    stages, n_decoders = report.stages, report.decoders
    shares = (
        f"read {stages['read']:.1f} s and decode {stages['decode']:.1f} s in {n_decoders} "
        f"processes, waited {stages['starve']:.1f} s for images, encode {stages['encode']:.1f} s, "
        f"write {stages['write']:.1f} s beside it"
    )
    return f"{shares}. {_advise(stages, n_decoders, count_cores())}"


def _advise(stages: dict[str, float], n_decoders: int, n_cores: int) -> str:
    total = stages["starve"] + stages["encode"]
    if stages["starve"] <= STARVING * total:
        return "The encoder sets the pace."
    if stages["read"] > stages["decode"]:
        return f"The disk sets the pace: --decoders {2 * n_decoders} reads more files at once."
    if n_decoders < n_cores:
        return f"Decoding sets the pace: --decoders {n_cores} uses every core."
    return f"Decoding sets the pace, on all {n_cores} cores: more would help."
