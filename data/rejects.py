"""When too many samples are unusable, training stops: then the data or the settings are wrong, not a few samples."""

from collections import Counter

from data.errors import DataError

ENOUGH = 1000  # samples before a share says something
LEFT_OUT = "left out: "  # how the reasons of filters and sizes begin: such samples are not unusable
RETRIED = "interrupted read, continued"  # counted like a reason, though no sample is lost by it


def samples_lost(skipped: Counter[str] | dict[str, int]) -> int:
    """How many of the counts are of samples (or whole shards) that cannot be used."""
    return sum(count for reason, count in skipped.items() if reason != RETRIED and not reason.startswith(LEFT_OUT))


def reasons(skipped: Counter[str] | dict[str, int]) -> str:
    """Counts as text, the most frequent reason first."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(skipped).most_common())


def check_rejects(used: int, skipped: Counter[str] | dict[str, int], limit: float) -> None:
    """Raises DataError if more than `limit` of the samples so far are unusable (once there are ENOUGH of them)."""
    lost = samples_lost(skipped)
    if used + lost >= ENOUGH and lost > limit * (used + lost):
        raise DataError(
            f"{lost} of {used + lost} samples of data.train are unusable, more than data.max_rejected={limit:g} allows "
            f"({reasons(skipped)}): check the shards with `disback shards --validate`, or raise the limit"
        )
