"""Calibration: a threshold for a wanted LLM share.

Shares are measured while routing, because routed text differs from either model's own: what the LLM
writes changes what the SLM is unsure of next.
"""

from collections.abc import Callable


def find_threshold(
    share_at: Callable[[float], float],
    target: float,
    *,
    low: float,
    high: float,
    rising: bool = False,
    tolerance: float = 0.02,
    max_steps: int = 12,
) -> tuple[float, float]:
    """Bisect for the threshold whose measured LLM share is nearest to `target`.

    Args:
        share_at: LLM share of generated tokens under a threshold, measured on routed text.
        target: wanted share, 0 to 1.
        low, high: thresholds between which to look.
        rising: whether the share rises with the threshold (the random router); else it falls.
        tolerance: relative error of the share that is good enough.
        max_steps: measurements at most.

    Returns:
        The threshold and its measured share.
    """
    best, best_share = low, share_at(low)
    for _ in range(max_steps - 1):
        middle = (low + high) / 2
        share = share_at(middle)
        if abs(share - target) < abs(best_share - target):
            best, best_share = middle, share
        if abs(best_share - target) <= tolerance * target:
            break
        if (share < target) == rising:
            low = middle
        else:
            high = middle
    return best, best_share
