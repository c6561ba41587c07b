"""Why a trial failed, as a run's ledger has it, and whether it would fail again."""

__all__ = ["describe_failure", "is_final"]

_MAX_CHARACTERS = 500
_FINAL = "TrainingDataError"


def describe_failure(error: Exception) -> str:
    """Return the error's type and message, at most 500 characters."""
    return f"{type(error).__name__}: {error}"[:_MAX_CHARACTERS]


def is_final(failure: object) -> bool:
    """Whether a failure as `describe_failure` has it would come again.

    What data or parameters do not allow would fail again; a full memory might not.
    """
    return str(failure).startswith(_FINAL)
