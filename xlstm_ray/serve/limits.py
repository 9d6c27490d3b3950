"""What a key may ask for in a minute, and what it has asked for."""

from math import ceil
from time import monotonic

from xlstm_ray.serve.options import Key
from xlstm_ray.serve.refusals import Refused

MINUTE_S = 60.0


class Bucket:
    """So many a minute, which come back evenly. What is taken beyond them is a debt, and time pays it back."""

    def __init__(self, most: int):
        self.most = most
        self._left, self._at = float(most), monotonic()

    @property
    def left(self) -> float:
        now = monotonic()
        self._left = min(self.most, self._left + (now - self._at) * self.most / MINUTE_S)
        self._at = now
        return self._left

    def take(self, count: int) -> None:
        self._left = self.left - count

    def seconds_until(self, left: float) -> float:
        """How long it takes until so many are left."""
        return max(0.0, left - self.left) * MINUTE_S / self.most


class Account:
    """Of one key. Requests count when they begin; tokens when they are computed: not those of a state or the cache.

    A request may take more tokens than are left; then the next one waits until the debt is paid.
    """

    def __init__(self, key: Key | None = None):
        limits = {} if key is None else {"requests": key.requests, "tokens": key.tokens}
        self._buckets = {name: Bucket(most) for name, most in limits.items() if most is not None}
        self.states_bytes = None if key is None else key.states_bytes  # None: as many as the service has room for

    def admit(self) -> None:
        """Count a request. Raises Refused where the key has none left in this minute, or no tokens."""
        for name, bucket in self._buckets.items():
            if bucket.left < 1:
                wait = ceil(bucket.seconds_until(1))
                raise Refused(
                    429,
                    f"this key has used its {bucket.most:,} {name} a minute; try again in {wait} s",
                    code="rate_limit_exceeded",
                    retry_s=wait,
                    headers=self.headers(),
                )
        self.charge(1, "requests")

    def charge(self, count: int, name: str = "tokens") -> None:
        """Count what was used."""
        if name in self._buckets:
            self._buckets[name].take(count)

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI's replies tell it."""
        told = {}
        for name, bucket in self._buckets.items():
            told[f"x-ratelimit-limit-{name}"] = str(bucket.most)
            told[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.left)))
            told[f"x-ratelimit-reset-{name}"] = f"{ceil(bucket.seconds_until(bucket.most))}s"
        return told
