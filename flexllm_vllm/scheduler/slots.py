"""Free slots of the worker's activation cache."""


class SlotPool:
    """Hands out activation-cache slots, lowest first, so that a pack's slots mostly adjoin."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Takes ``count`` slots; the caller has checked ``num_free``."""
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tuple(reversed(taken))

    def give_back(self, slots: tuple[int, ...]) -> None:
        self._free.extend(slots)
        self._free.sort(reverse=True)
