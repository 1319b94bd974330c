"""Activations kept from a finetuning token's forward until its backward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from flexllm_vllm.worker.activation_codec import ActivationCodec

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


class ActivationCache:
    """A pool of equal pages, allocated once. Which pack holds which page the scheduler decides.

    Args:
        num_pages: pages of the pool.
        page_bytes: size of a page.
        codec: how values are stored.
        device: where.
    """

    def __init__(
        self, num_pages: int, page_bytes: int, codec: ActivationCodec, device: torch.device
    ) -> None:
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

    def write(
        self, layout: TokenLayout, pages: list[int], key: Key, start: int, x: torch.Tensor
    ) -> None:
        """Stores rows ``[start, start + n)`` of a pack.

        Args:
            layout: of the pack's adapter.
            pages: of the pack.
            key: (layer, name); ``(num_layers, "hidden")`` is the input of the final norm.
            start: first row.
            x: ``[n, width]``.
        """
        encoded = self.codec.encode(x)
        for chunk, rows in self._chunks(layout, pages, key, start, start + x.shape[0]):
            chunk.copy_(encoded[rows].view(chunk.shape))

    def read(
        self, layout: TokenLayout, pages: list[int], key: Key, start: int, end: int
    ) -> torch.Tensor:
        """Rows ``[start, end)`` of a pack, ``[end - start, width]``."""
        width = layout.widths[key]
        encoded = self._pool.new_empty(end - start, self.codec.row_bytes(width))
        for chunk, rows in self._chunks(layout, pages, key, start, end):
            encoded[rows].view(chunk.shape).copy_(chunk)
        return self.codec.decode(encoded, width)

    def _chunks(
        self, layout: TokenLayout, pages: list[int], key: Key, start: int, end: int
    ) -> Iterator[tuple[torch.Tensor, slice]]:
        """Pieces of the pool that hold the rows, as large as possible, and which rows they are."""
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
