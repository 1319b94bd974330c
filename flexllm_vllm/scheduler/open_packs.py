"""The packs that hold something: KV blocks, batch rows, pages of the activation cache."""

from collections.abc import Collection

from vllm.lora.request import LoRARequest

from flexllm_vllm.scheduler.hidden_rows import HiddenRows
from flexllm_vllm.scheduler.pack import Pack, PackPhase, Sequence
from flexllm_vllm.scheduler.pages import PagePool


class OpenPacks:
    """Admits packs, and gives up those that must make room.

    A pack that is given up starts again later, as a new attempt with a new id.

    Args:
        rows: KV blocks and batch rows.

    Attributes:
        rows: likewise.
        pages: of the activation cache.
        num_dropped: packs given up to inference, or to an older pack, so far.
    """

    def __init__(self, rows: HiddenRows) -> None:
        self.rows = rows
        self.pages = PagePool(0)
        self.num_dropped = 0
        self._packs: dict[int, Pack] = {}
        self._dropped: list[int] = []

    def get(self, pack_id: int) -> Pack | None:
        """A pack that is open, or done without its result being known yet."""
        return self._packs.get(pack_id)

    def of_job(self, job_id: str) -> list[Pack]:
        return [pack for pack in self._packs.values() if pack.job_id == job_id]

    def admit(self, pack: Pack, num_pages: int, lora: LoRARequest | None) -> bool:
        """Opens a pack if pages and KV blocks are there for all of it.

        Args:
            pack: that waits.
            num_pages: that it needs.
            lora: the adapter of its rows; None for the base model.
        """
        if not self._fits(pack, num_pages):
            return False
        pack.pages = self.pages.take(num_pages)
        pack.phase = PackPhase.FORWARD
        self._packs[pack.pack_id] = pack
        self.rows.open(pack, lora)
        return True

    def _fits(self, pack: Pack, num_pages: int) -> bool:
        # Blocks that open packs will still ask for are not free, or two would wait for each other.
        promised = sum(
            s.num_blocks(self.rows.block_size) - self._blocks(s)
            for other in self._packs.values()
            if other.phase is PackPhase.FORWARD
            for s in other.sequences
        )
        return num_pages <= self.pages.num_free and self.rows.fits(pack, promised)

    def _blocks(self, sequence: Sequence) -> int:
        """KV blocks that a sequence of an open pack has so far."""
        return -(-sequence.done // self.rows.block_size)

    def stand_in_the_way_of(self, pack: Pack, num_pages: int) -> bool:
        """Whether a pack that waits can be admitted once those that are open have ended, and not
        before."""
        held = sum(
            self._blocks(s)
            for other in self._packs.values()
            if other.is_open
            for s in other.sequences
        )
        return not self._fits(pack, num_pages) and self.rows.fits(pack, -held)

    def finish(self, pack: Pack) -> None:
        """A pack's backward is planned to its end: it needs its blocks and pages no more."""
        pack.phase = PackPhase.DONE
        self._release(pack)
        self.forget(pack)

    def forget(self, pack: Pack) -> None:
        """Drops a pack that is done, once its result is known too."""
        if pack.phase is PackPhase.DONE and pack.result is not None:
            self._packs.pop(pack.pack_id, None)

    # -- giving up ---------------------------------------------------------------------------

    def give_up(self, pack: Pack) -> None:
        """Frees what a pack holds; it will be redone."""
        self._dropped.append(pack.pack_id)
        self._release(pack)
        self._packs.pop(pack.pack_id, None)
        pack.restart()

    def give_up_youngest(self) -> bool:
        """Frees the KV blocks of the pack that lost least; it is redone. False if there is none."""
        open_packs = [p for p in self._packs.values() if p.is_open]
        if not open_packs:
            return False
        self.give_up(max(open_packs, key=lambda p: p.pack_id))
        self.num_dropped += 1
        return True

    def give_up_all(self) -> bool:
        """Frees all KV blocks. False if there were none."""
        given_up = False
        while self.give_up_youngest():
            given_up = True
        return given_up

    def yield_to(self, pack: Pack, planned: Collection[int]) -> None:
        """Half-finished packs must not wait for each other's blocks: a younger one gives way.

        Args:
            pack: that lacks blocks.
            planned: ids of packs that have forward windows in this iteration.
        """
        others = [p for p in self._packs.values() if p.is_open and p is not pack]
        if any(p.phase is PackPhase.BACKWARD for p in others):
            return  # it will be done, and free its blocks
        younger = [p for p in others if p.pack_id > pack.pack_id and p.pack_id not in planned]
        if younger:
            self.give_up(max(younger, key=lambda p: p.pack_id))
            self.num_dropped += 1

    def reset(self) -> None:
        """Forgets all packs and frees what they held, whatever state they were left in."""
        self.give_up_all()
        self.rows.discard()
        self._packs.clear()

    def _release(self, pack: Pack) -> None:
        self.rows.close(pack)
        self.pages.give_back(pack.pages)
        pack.pages = ()

    # -- what the worker must hear of --------------------------------------------------------

    def take_dropped(self) -> list[int]:
        """Packs given up since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def give_back_dropped(self, dropped: list[int]) -> None:
        """The worker has yet to hear of these."""
        self._dropped = dropped + self._dropped
