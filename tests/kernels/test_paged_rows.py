import pytest
import torch

from flashmem.kernels.index_rows import encode_index_rows
from flashmem.kernels.kv_codec import KVFormatSpec, PlanarForm, encode_rows
from flashmem.kernels.paged import PagedRows, index_row_form, places
from support.paged_cases import POISON, draw, interleaved_index_rows, pooled_entries

CPU = torch.device("cpu")


def test_rows_come_back_through_page_tables() -> None:
    spec, counts = KVFormatSpec("fp8", 96, 32), [9, 0, 4, 17]
    rows = pooled_entries(spec, counts, CPU, page_chunks=4)
    assert rows.max_rows == 17 and rows.valid().sum(1).tolist() == counts
    read = rows.read()
    for b, count in enumerate(counts):
        assert torch.equal(read[b, :count], encode_rows(spec, draw(count, 96, seed=b)))


def test_interleaved_rows_are_pages_of_one_chunk() -> None:
    rows = interleaved_index_rows([3, 7], 12, CPU, layers=2)
    assert (rows.num_layers, rows.batch, rows.page_stride, rows.alignment) == (2, 2, 16, 4)
    assert torch.equal(rows.read(1)[1], encode_index_rows(draw(7, 12, seed=101)))


def test_alignment_is_what_all_addresses_share() -> None:
    memory = torch.full((1000,), POISON, dtype=torch.uint8)
    offset = -memory.data_ptr() % 16
    for first, alignment in ((0, 4), (4, 4), (2, 2), (1, 1)):
        region = memory[offset + first : offset + first + 132 * 4].view(4, 132)
        assert PagedRows(index_row_form(128), [[region]], [4]).alignment == alignment


def test_counts_on_the_device_are_taken_as_they_are() -> None:
    region = torch.zeros(5, 16, dtype=torch.uint8)
    counts = torch.tensor([3, 4], dtype=torch.int32)
    rows = PagedRows(PlanarForm(4, 4, 0), [[region]], counts, torch.zeros(2, 3, dtype=torch.int64))
    assert rows.counts_B is counts and rows.max_rows == 12


@pytest.mark.parametrize(
    ("counts", "sizes", "message"),
    [
        ([5], [(4, 16)], "a session of 5 rows has room for 4"),
        ([1, 1, 1], [(4, 16), (4, 16)], "2 regions for 3 sessions"),
        ([1], [(4, 17)], "must be uint8"),
        ([], [], "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(counts: list[int], sizes: list[tuple[int, int]], message: str) -> None:
    regions = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    with pytest.raises(ValueError, match=message):
        PagedRows(index_row_form(12), [regions], counts)


def test_pages_of_different_strides_are_refused() -> None:
    wide, narrow = torch.zeros(4, 32, dtype=torch.uint8)[:, :16], torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"one page stride, got \[16, 32\]"):
        PagedRows(index_row_form(12), [[wide, narrow]], [1, 1])
    with pytest.raises(ValueError, match="dense"):
        PagedRows(index_row_form(12), [[torch.zeros(4, 32, dtype=torch.uint8)[:, ::2]]], [1])


def test_places_leave_room_to_grow() -> None:
    assert [places(count, 4) for count in (0, 1, 4, 5, 63, 64)] == [4, 4, 4, 8, 64, 128]
    assert [places(count, 64) for count in (1, 1009, 1010, 4096, 4097, 8064)] == [64, 1024, 2048, 8192, 8192, 8192]
    assert all(places(count, 1) >= count for count in range(1, 3000))
