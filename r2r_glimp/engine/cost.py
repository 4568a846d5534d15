"""Cost: what a forward pass takes, learnt from the passes that ran.

seconds = fixed + per_token x tokens        whoever takes part: the weights are read once
"""

_FADE = 0.98  # weight of a pass when the next one has run: some 50 count


class PassCost:
    """Seconds of one model's passes as a line over their tokens: least squares of the relative
    error, where older passes fade.

    Attributes:
        total_s: seconds of all of them.
    """

    def __init__(self) -> None:
        self.total_s = 0.0
        self._w = self._wx = self._wxx = self._wy = self._wxy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        self.total_s += seconds
        x, weight = float(num_tokens), 1 / (num_tokens * num_tokens)
        terms = (weight, weight * x, weight * x * x, weight * seconds, weight * x * seconds)
        self._w, self._wx, self._wxx, self._wy, self._wxy = (
            _FADE * old + new
            for old, new in zip(
                (self._w, self._wx, self._wxx, self._wy, self._wxy), terms, strict=True
            )
        )

    @property
    def fixed_s(self) -> float:
        """Seconds of a pass that do not depend on its tokens; 0 before the first."""
        if not self._w:
            return 0.0
        mean_x, mean_y = self._wx / self._w, self._wy / self._w
        variance = self._wxx / self._w - mean_x * mean_x
        if variance < 1e-6 * mean_x * mean_x:
            return mean_y  # all of one size
        slope = (self._wxy / self._w - mean_x * mean_y) / variance
        return min(max(0.0, mean_y - max(0.0, slope) * mean_x), mean_y)
