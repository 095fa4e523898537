"""How long batches take, as measured: the base of every promise that the scheduler makes.

A batch has a fixed cost and one for each token, and their shares differ a hundredfold between a CPU
and a GPU. So batches of similar size are averaged together, and sizes in between are interpolated.
"""

from math import isfinite

# A batch weighs as much as the seconds it took, within these bounds: the average covers about a
# second of work on any device.
_MIN_WEIGHT, _MAX_WEIGHT = 0.02, 0.25
# A batch counts as at most this many times slower than expected. A process that was suspended in
# the middle of one batch must not refuse everything afterwards.
_MAX_SURPRISE = 4.0
_DEVIATION_WEIGHT = 0.1


class _Size:
    """Batches of similar size: their mean tokens and seconds. count: with those of the warm-up."""

    __slots__ = ("count", "seconds", "tokens")

    def __init__(self, tokens: float, seconds: float) -> None:
        self.tokens, self.seconds, self.count = tokens, seconds, 1

    def add(self, tokens: float, seconds: float) -> None:
        self.count += 1
        weight = max(1 / self.count, min(_MAX_WEIGHT, max(_MIN_WEIGHT, seconds)))
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)


class Pace:
    """Seconds that one lane takes for a batch. The scheduler's lock guards it.

    Args:
        lanes: batches that run side by side.

    Attributes:
        deviation: of batches from what was expected of them: the mean, as a share of that.
    """

    def __init__(self, lanes: int = 1) -> None:
        self._lanes = lanes
        # By the power of two in which a size lies; a batch may find its neighbours there.
        self._sizes: dict[int, _Size] = {}
        self._points: list[_Size] = []
        # Mean deviation of batches from what was expected, as a share of that.
        self.deviation = 0.0

    @property
    def measured(self) -> bool:
        return bool(self._points)

    def record(self, tokens: int, seconds: float) -> None:
        """Note that a lane took this long for a batch."""
        if tokens < 1 or not (isfinite(seconds) and seconds > 0):
            return
        octave = tokens.bit_length()
        known = self._sizes.get(octave)
        if known is None:
            self._sizes[octave] = _Size(tokens, seconds)
            self._points = [self._sizes[key] for key in sorted(self._sizes)]
            return
        expected = self.seconds(tokens)
        seconds = min(seconds, _MAX_SURPRISE * expected)
        error = abs(seconds - expected) / expected
        self.deviation += _DEVIATION_WEIGHT * (error - self.deviation)
        known.add(tokens, seconds)

    def seconds(self, tokens: float) -> float:
        """What a batch of this size takes; 0 before anything was measured."""
        below: _Size | None = None
        for point in self._points:
            if point.tokens >= tokens:
                if below is None:
                    # A smaller batch than any measured: mostly fixed cost.
                    return point.seconds
                share = (tokens - below.tokens) / (point.tokens - below.tokens)
                return below.seconds + share * (point.seconds - below.seconds)
            below = point
        return 0.0 if below is None else below.seconds * tokens / below.tokens

    def rate(self, tokens: float) -> float:
        """Tokens per second of the whole device in batches of this size; 0 if not measured."""
        seconds = self.seconds(tokens)
        return self._lanes * tokens / seconds if seconds > 0 else 0.0

    def least_efficient(self, share: float, most: int) -> int:
        """The least of `most`, its half, its quarter, ... at which the device does this share of
        the work that it does at `most`."""
        wanted, tokens = share * self.rate(most), most
        while tokens > 1 and self.rate(tokens // 2) >= wanted > 0:
            tokens //= 2
        return tokens

    def tokens_within(self, seconds: float, most: int) -> int:
        """The largest batch up to `most` tokens that takes at most this long, to about 10 %."""
        if self.seconds(most) <= seconds:
            return most
        low, high = 0.0, float(most)
        for _ in range(6):
            middle = (low + high) / 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle)
        return int(low)
