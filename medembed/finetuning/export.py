"""How a trial ended, kept in the run; and the run's end: predictions, leaderboard, scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import MedembedError, RunError
from medembed.dataset.manifest import Manifest
from medembed.evaluation.thresholds import ThresholdRule
from medembed.finetuning.data_split import HELD_OUT, TrainRows
from medembed.finetuning.training import Trained
from medembed.results.comparison import score_run
from medembed.results.failures import describe_failure, is_final
from medembed.results.model_readme import complete_cards
from medembed.results.predictions import image_rows, prior_rows
from medembed.results.provenance import list_left_out, summarise_data
from medembed.results.runs import Run, utc_now

__all__ = ["TrialResult", "finish", "load_ending"]


@dataclass(frozen=True, eq=False)
class TrialResult:
    """One depth with one seed, trained or failed.

    Attributes
    ----------
    known : dict
        ``number``, ``head``, ``depth``, ``lora`` (rank of its adapters, or None), ``seed``,
        ``key``, ``pooling``, ``params``, ``trainable`` (how many numbers of tower and head
        training changes; None where it did not begin).
    score : float or None
        AUROC of the held-out patients' studies at the best epoch, which they have not chosen; None
        where it failed.
    best_epoch : int or None
    seconds : float
    error : str or None
    encoder : str or None
        Fingerprint of the adapted encoder.
    history : list of dict
        Per epoch `train_loss`, `loss`, `auroc`.
    probability : float64 array or None
        Of the held-out rows, then of the test rows.
    """

    known: Mapping[str, Any]
    score: float | None
    best_epoch: int | None
    seconds: float
    error: str | None
    encoder: str | None
    history: Sequence[Mapping[str, float]]
    probability: NDArray[np.float64] | None

    @classmethod
    def of(cls, trained: Trained, encoder: str | None, known: Mapping[str, Any]) -> "TrialResult":
        """Describe a training that went well."""
        counters = trained.counters
        return cls(
            known=known,
            score=trained.score,
            best_epoch=counters.best_epoch,
            seconds=counters.seconds,
            error=None,
            encoder=encoder,
            history=counters.history,
            probability=np.concatenate([trained.held, trained.tested]),
        )

    @classmethod
    def failed(cls, error: MedembedError, known: Mapping[str, Any]) -> "TrialResult":
        """Describe one that did not."""
        return cls(known, None, None, 0.0, describe_failure(error), None, [], None)

    def write(self, run: Run) -> None:
        """Keep it in the run's ledger; it is on disk when this returns."""
        key = self.known["key"]
        if self.probability is not None:
            run.keep_fold(key, self.probability)
        run.append_trial(
            {
                "trial": self.known["number"],
                "head": self.known["head"],
                "pooling": self.known["pooling"],
                "params": dict(self.known["params"]),
                "fold": HELD_OUT,
                "score": self.score,
                "best_epoch": self.best_epoch,
                "seconds": self.seconds,
                "status": "ok" if self.error is None else "error",
                "error": self.error,
                "key": key,
                "depth": self.known["depth"],
                "lora": self.known["lora"],
                "seed": self.known["seed"],
                "trainable": self.known["trainable"],
                "encoder": self.encoder,
                "history": list(self.history),
            }
        )

    def as_entry(self) -> dict[str, Any]:
        """Return the line of the leaderboard."""
        return {
            "head": self.known["head"],
            "pooling": self.known["pooling"],
            "trial": None if self.error else self.known["number"],
            "params": dict(self.known["params"]),
            "cv": self.score,
            "seconds": round(self.seconds, 3),
            "status": "ok" if self.error is None else "error",
            "error": self.error,
            "depth": self.known["depth"],
            "lora": self.known["lora"],
            "seed": self.known["seed"],
            "trainable": self.known["trainable"],
            "best_epoch": self.best_epoch,
            "encoder": self.encoder,
        }


def load_ending(run: Run, key: str, rows: TrainRows) -> TrialResult | None:
    """Read how the trial of this key ended; None where it is to be trained, or trained again."""
    records = [record for record in run.trial_records() if record.get("key") == key]
    if not records:
        return None
    record = records[-1]
    probability = run.kept_fold(key)
    if record["status"] == "ok":
        whole = probability is not None and len(probability) == len(rows.held) + len(rows.tested)
        is_done = whole and (
            not record["depth"] or (run.path / "encoders" / record["head"]).is_dir()
        )
    else:
        is_done = is_final(record["error"])
    if not is_done:
        run.forget_trials({key})
        return None
    names = ("head", "depth", "seed", "key", "pooling", "params")
    known = {"number": record["trial"], **{name: record[name] for name in names}}
    known |= {name: record.get(name) for name in ("lora", "trainable")}  # not in older runs
    return TrialResult(
        known=known,
        score=record["score"],
        best_epoch=record["best_epoch"],
        seconds=record["seconds"],
        error=record["error"],
        encoder=record["encoder"],
        history=record["history"],
        probability=probability,
    )


def finish(
    run: Run,
    manifest: Manifest,
    rows: TrainRows,
    endings: Sequence[TrialResult],
    build: dict[str, Any] | None = None,
    points: Sequence[ThresholdRule] = (),
) -> None:
    """Write predictions, leaderboard and counts, then the scores, which complete the run.

    `build` is what is known of how the manifest was built, `points` are operating points beside the
    usual ones.

    Raises
    ------
    RunError
        Every depth failed.
    """
    ordered = sorted(endings, key=lambda e: np.inf if e.score is None else -e.score)
    trained = [ending for ending in ordered if ending.probability is not None]
    if not trained:
        reasons = "; ".join(f"{e.known['head']}: {e.error}" for e in ordered)
        raise RunError(f"every depth failed in the run at {run.path}. {reasons}")
    own = np.concatenate([rows.held, rows.tested])
    # The codes of patients and studies are those of all rows, as the priors have them.
    images = image_rows(rows.rows, np.where(rows.folds == HELD_OUT, HELD_OUT, -1)).iloc[own]
    parts = [
        images.assign(
            head=ending.known["head"],
            trial=ending.known["number"],
            probability=ending.probability,
        )
        for ending in trained
    ]
    parts += prior_rows(rows.rows, rows.folds)
    run.write_predictions(pd.concat(parts, ignore_index=True))
    run.update_info(
        leaderboard=[ending.as_entry() for ending in ordered],
        data=summarise_data(manifest.rows, rows.failed, manifest.label_level, build),
        left_out=list_left_out(manifest.rows, rows.failed),
        times={**run.info["times"], "ended": utc_now()},
    )
    scores = score_run(run, operating_points=points)
    complete_cards(run, scores)
    run.write_scores(scores)
