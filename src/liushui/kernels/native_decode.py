"""A step that feeds each sequence one token and asks for no more than the most likely next ones: what most steps are.

Between two steps the model's weights go through the caches, and all that Python touches for the next one comes from
memory: some 0.1 us for each 64 bytes. So the inputs lie in memory of their own, the library is told once where, and
what stays from step to step is not written again.
"""

from __future__ import annotations

from ctypes import addressof, byref, c_int32, c_int64

from liushui.kernels.arrays import Array
from liushui.kernels.native_linear import NativeProducts
from liushui.kernels.native_step import NativeStep
from liushui.kernels.ops import PackedLinear


class NativeDecode:
    """Token ids in, token ids out; the bits are those of `NativeProducts.embed` and `NativeStep`."""

    def __init__(self, step: NativeStep, products: NativeProducts, table: PackedLinear) -> None:
        """`table` [vocabulary, H]: the embedding, in the step's type as it comes."""
        self._step, self._products, self._table = step, products, table
        self._block_size = step.block_size
        self._batch = step.new_batch()
        self._at_batch = byref(self._batch)
        self._rows = self._count = self._width = 0
        self._tables: list[tuple[int, ...]] = []
        """What is written in the rows of the block table."""

    def __call__(self, ids: list[int], starts: list[int], tables: list[tuple[int, ...]]) -> list[int]:
        """Feed token `ids[i]` to sequence i at position `starts[i]`, with its blocks `tables[i]`, at least those of the
        positions up to that. A table that is the same object is not read again.

        Returns the most likely next token of each (the smallest of equals; -1 where the logits are not finite). Raises
        `IndexError` for ids, positions or blocks out of range.
        """
        count, size, slots = len(ids), self._block_size, []
        if count != self._count:
            self._lay_out(count)
        for row, (start, table) in enumerate(zip(starts, tables, strict=True)):
            slots.append(table[start // size] * size + start % size)
            if self._tables[row] is not table:
                self._write(row, table)
        self._ids[:count] = ids  # type: ignore[assignment]  # lists are invariant
        self._numbers[: 3 * count] = [*starts, *slots, *[start + 1 for start in starts]]
        self._embed(count)
        self._step.run(self._at_batch, count)
        return self._tokens[:count]

    def _lay_out(self, count: int) -> None:
        """From now on steps have `count` sequences."""
        if count > self._rows:
            self._make(count)
        batch, numbers = self._batch, addressof(self._numbers)
        batch.positions, batch.slots, batch.seq_lens = numbers, numbers + 4 * count, numbers + 8 * count
        batch.rows = batch.num_wanted = batch.num_tokens = batch.num_sequences = self._count = count

    def _make(self, rows: int) -> None:
        """Memory for that many sequences."""
        step, batch, hidden = self._step, self._batch, self._step.parts.hidden
        step.reserve(rows, rows)
        self._ids, self._numbers, self._tokens = (c_int64 * rows)(), (c_int32 * (3 * rows))(), (c_int32 * rows)()
        self._order = (c_int32 * (rows + 1))(*range(rows + 1))
        self._x, self._hidden = (Array.empty((rows, hidden), step.parts.dtype) for _ in range(2))
        x = self._x.data_ptr()
        self._embed = self._products.embedding(self._table, step.parts.dtype, addressof(self._ids), x)
        batch.x, batch.hidden, batch.tokens = x, self._hidden.data_ptr(), addressof(self._tokens)
        batch.query_start = batch.wanted = addressof(self._order)  # row i is sequence i
        self._rows = rows
        self._make_tables(self._width)

    def _make_tables(self, width: int) -> None:
        """Block tables of that many blocks, to be written anew."""
        self._blocks, self._tables = (c_int32 * (self._rows * width))(), [()] * self._rows
        self._batch.block_table, self._batch.max_blocks, self._width = addressof(self._blocks), width, width

    def _write(self, row: int, table: tuple[int, ...]) -> None:
        if len(table) > self._width:
            tables = self._tables
            self._make_tables(2 * len(table))
            for other, known in enumerate(tables):
                if other != row:
                    self._write(other, known)
        begin = row * self._width
        self._blocks[begin : begin + len(table)] = list(table)
        self._tables[row] = table
