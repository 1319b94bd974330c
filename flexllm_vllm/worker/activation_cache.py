"""Activations kept from a finetuning token's forward until its backward."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.worker.activation_codec import ActivationCodec
from flexllm_vllm.worker.transfer import to_device

# Tokens in a page for an adapter on all linear layers; of one that keeps less, more fit into it.
PAGE_TOKENS = 32

Key = tuple[int, str]


@dataclass(frozen=True)
class TokenLayout:
    """Where the values of a token lie within a page, for one adapter.

    A page holds, for each (layer, name) in turn, the rows of all its tokens.

    Attributes:
        widths: (layer, name) -> elements kept per token.
        offsets: (layer, name) -> bytes of those before it, per token.
        token_bytes: bytes per token.
        tokens_per_page: tokens that a page holds.
    """

    widths: dict[Key, int]
    offsets: dict[Key, int]
    token_bytes: int
    tokens_per_page: int

    def num_pages(self, num_tokens: int) -> int:
        """Pages that this many tokens of one pack need."""
        return -(-num_tokens // self.tokens_per_page)


@dataclass(frozen=True)
class KeptRows:
    """Where the rows of a pack lie in the cache.

    Attributes:
        layout: of the pack's adapter.
        pages: of the pack.
        page_ids: the same, ``[num_pages]`` int64 on the host.
        index: on a device, of each row the page and the place in it, ``[num_rows]`` int64 each.
    """

    layout: TokenLayout
    pages: tuple[int, ...]
    page_ids: torch.Tensor
    index: tuple[torch.Tensor, torch.Tensor] | None


class ActivationCache:
    """A pool of equal pages, allocated once. Which pack holds which page the scheduler decides.

    On the host rows are copied a run of pages at a time, which is as fast as memory; on a device
    by one indexed copy, whatever the number of pages.

    Args:
        num_pages: pages of the pool.
        page_bytes: size of a page.
        codec: how values are stored.
        device: where.
        is_indexed: whether rows are copied by an index; by default on a device.
    """

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        codec: ActivationCodec,
        device: torch.device,
        is_indexed: bool | None = None,
    ) -> None:
        self._is_indexed = device.type != "cpu" if is_indexed is None else is_indexed
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.codec = codec
        # Not cleared: memory that is never used is never taken from the operating system.
        self._pool = torch.empty(num_pages, page_bytes, dtype=torch.uint8, device=device)

    @property
    def num_bytes(self) -> int:
        return self._pool.nbytes

    def layout(self, widths: Mapping[Key, int]) -> TokenLayout:
        """The layout for an adapter that keeps these values.

        Raises:
            ValueError: not even one token fits into a page.
        """
        offsets, token_bytes = {}, 0
        for key, width in widths.items():
            offsets[key] = token_bytes
            token_bytes += self.codec.row_bytes(width)
        tokens_per_page = self.page_bytes // max(token_bytes, 1)
        if tokens_per_page == 0:
            raise ValueError(f"a token keeps {token_bytes} bytes, a page has {self.page_bytes}")
        return TokenLayout(dict(widths), offsets, token_bytes, tokens_per_page)

    def rows(self, layout: TokenLayout, pages: Sequence[int]) -> KeptRows:
        """Where the rows of a pack with these pages lie."""
        index = None
        page_ids = torch.tensor(pages, dtype=torch.int64)
        if self._is_indexed:
            per_page = layout.tokens_per_page
            page = page_ids.repeat_interleave(per_page)
            place = torch.arange(per_page).repeat(len(pages))
            index = (to_device(page, self._pool.device), to_device(place, self._pool.device))
        return KeptRows(layout, tuple(pages), page_ids, index)

    def write(
        self,
        kept: KeptRows,
        key: Key,
        start: int,
        x: torch.Tensor,
        addend: torch.Tensor | None = None,
    ) -> None:
        """Stores rows ``[start, start + n)`` of a pack.

        Args:
            kept: the pack's rows.
            key: (layer, name); ``(num_layers, "hidden")`` is the input of the final norm.
            start: first row.
            x: ``[n, width]``.
            addend: like ``x``; the sum of both is stored.
        """
        if kept.index is None and self._write_floats(kept, key, start, x, addend):
            return
        if addend is not None:
            x = x + addend
        encoded, end = self.codec.encode(x), start + x.shape[0]
        if kept.index is not None:
            page, place = (i[start:end] for i in kept.index)
            table = self._table(kept.layout, key)
            table.index_put_((page, place), encoded.view(table.dtype))
            return
        for chunk, rows in self._chunks(kept, key, start, end):
            chunk.copy_(encoded[rows].view(chunk.shape))

    def _write_floats(
        self, kept: KeptRows, key: Key, start: int, x: torch.Tensor, addend: torch.Tensor | None
    ) -> bool:
        """In one pass, where floats are stored as they are; False where they are not."""
        layout, (rows, width) = kept.layout, x.shape
        per_page = layout.tokens_per_page
        adjoin = x.stride(1) == 1 and (addend is None or addend.stride(1) == 1)
        floats = x.dtype == torch.float32 and self.codec.keeps(x.dtype) and not self.page_bytes % 4
        if not (adjoin and floats and start + rows <= per_page * len(kept.pages)):
            return False
        return native.call(
            "keep_rows", x, x.stride(0), addend, 0 if addend is None else addend.stride(0), rows,
            width, self._pool, self.page_bytes // 4, kept.page_ids,
            layout.offsets[key] // 4 * per_page, per_page, start,
        )  # fmt: skip

    def read(self, kept: KeptRows, key: Key, start: int, end: int) -> torch.Tensor:
        """Rows ``[start, end)`` of a pack, ``[end - start, width]``."""
        width = kept.layout.widths[key]
        if kept.index is not None:
            page, place = (i[start:end] for i in kept.index)
            found = self._table(kept.layout, key)[page, place]
            return self.codec.decode(found.view(torch.uint8), width)
        encoded = self._pool.new_empty(end - start, self.codec.row_bytes(width))
        for chunk, rows in self._chunks(kept, key, start, end):
            encoded[rows].view(chunk.shape).copy_(chunk)
        return self.codec.decode(encoded, width)

    def _table(self, layout: TokenLayout, key: Key) -> torch.Tensor:
        """The pool as ``[num_pages, tokens_per_page, row]``, the values of this key alone; of words
        of four bytes where all sizes allow it."""
        row, base = self.codec.row_bytes(layout.widths[key]), layout.offsets[key]
        base *= layout.tokens_per_page
        word = 1 if any(size % 4 for size in (row, base, self.page_bytes)) else 4
        pool = self._pool if word == 1 else self._pool.view(torch.int32)
        shape = (self.num_pages, layout.tokens_per_page, row // word)
        strides = (self.page_bytes // word, row // word, 1)
        return pool.as_strided(shape, strides, base // word)

    def _chunks(
        self, kept: KeptRows, key: Key, start: int, end: int
    ) -> Iterator[tuple[torch.Tensor, slice]]:
        """Pieces of the pool that hold the rows, as large as possible, and which rows they are."""
        layout, pages = kept.layout, kept.pages
        per_page, row_bytes = layout.tokens_per_page, self.codec.row_bytes(layout.widths[key])
        base = per_page * layout.offsets[key]
        row = start
        while row < end:
            index, first = divmod(row, per_page)
            count, run = min(per_page - first, end - row), 1
            if first == 0:
                # Whole pages that adjoin are one strided copy.
                while (
                    row + (run + 1) * per_page <= end and pages[index + run] == pages[index] + run
                ):
                    run += 1
            begin = base + first * row_bytes
            chunk = self._pool[pages[index] : pages[index] + run, begin : begin + count * row_bytes]
            yield chunk, slice(row - start, row - start + run * count)
            row += run * count
