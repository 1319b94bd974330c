"""Free pages of the worker's activation cache."""


class PagePool:
    """Hands out pages, lowest first, so that a pack's pages mostly adjoin."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Takes ``count`` pages; the caller has checked ``num_free``."""
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tuple(reversed(taken))

    def give_back(self, pages: tuple[int, ...]) -> None:
        self._free.extend(pages)
        self._free.sort(reverse=True)
