from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.rect import Local, Piece, Rect, check_disjoint, check_partition, view


def rects(hf: str = "w") -> st.SearchStrategy[Rect]:
    start, size = st.integers(0, 7), st.integers(1, 6)
    return st.builds(Rect, st.just(hf), start, start, size, size)


def cells(rect: Rect) -> set[tuple[int, int]]:
    return {(row, col) for row in range(rect.row, rect.row + rect.rows) for col in range(rect.col, rect.col + rect.cols)}


@given(rects(), rects())
def test_an_intersection_is_the_set_of_common_elements(left: Rect, right: Rect) -> None:
    common = left.intersect(right)
    assert (cells(common) if common else set()) == cells(left) & cells(right)
    assert common == right.intersect(left)


def test_rectangles_of_different_tensors_never_meet() -> None:
    assert Rect("a", 0, 0, 2, 2).intersect(Rect("b", 0, 0, 2, 2)) is None


@given(st.lists(rects(), max_size=5))
def test_disjointness_is_that_of_the_sets(found: list[Rect]) -> None:
    overlaps = len(set().union(*map(cells, found))) != sum(rect.area for rect in found)
    if overlaps:
        with pytest.raises(GeometryError, match="overlap"):
            check_disjoint(found)
    else:
        check_disjoint(found)


@given(st.lists(rects(), max_size=4), st.integers(1, 8), st.integers(1, 8))
def test_a_partition_is_an_exact_cover(found: list[Rect], rows: int, cols: int) -> None:
    everything = {(row, col) for row in range(rows) for col in range(cols)}
    counted = sorted(cell for rect in found for cell in cells(rect))
    if counted == sorted(everything):
        check_partition({"w": (rows, cols)}, found)
    else:
        with pytest.raises(GeometryError):
            check_partition({"w": (rows, cols)}, found)


def test_four_quarters_make_a_matrix_and_three_do_not() -> None:
    quarters = [Rect("w", row, col, 2, 3) for row in (0, 2) for col in (0, 3)]
    check_partition({"w": (4, 6)}, quarters)
    with pytest.raises(GeometryError, match=r"w: not covered\n  expected: 24 elements\n  got: 18"):
        check_partition({"w": (4, 6)}, quarters[:3])


def test_a_hole_is_not_made_up_for_by_an_overlap() -> None:
    with pytest.raises(GeometryError, match="overlap"):
        check_partition({"w": (4,)}, [Rect("w", 0, 0, 2, 1), Rect("w", 1, 0, 2, 1)])


def test_two_pieces_of_a_local_tensor_may_not_share_an_element() -> None:
    pieces = (Piece(Rect("q", 0, 0, 2, 4)), Piece(Rect("k", 0, 0, 2, 4), row=1))
    with pytest.raises(GeometryError, match="overlap"):
        Local("qkv", (4, 4), torch.float32, pieces)


@pytest.mark.parametrize("piece", [Piece(Rect("q", 0, 0, 3, 4), row=2), Piece(Rect("q", 0, 0, 2, 4), index=(5,))])
def test_a_piece_must_fit_its_local_tensor(piece: Piece) -> None:
    shape = (5, 4, 4) if piece.index else (4, 4)
    with pytest.raises(GeometryError, match="does not fit"):
        Local("qkv", shape, torch.float32, (piece,))


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_an_empty_rectangle_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(GeometryError, match="empty or negative"):
        Rect("w", 0, 0, *size)


def test_a_view_is_the_part_of_the_piece_that_was_asked_for() -> None:
    # Rows 10..13 of HF "w" lie at rows 2..5 of expert 1; of these, rows 11 and 12, columns 1 and 2.
    local = torch.arange(2 * 6 * 4).view(2, 6, 4)
    piece = Piece(Rect("w", 10, 0, 4, 4), row=2, index=(1,))
    part = view(local, piece, Rect("w", 11, 1, 2, 2))
    assert part.tolist() == [[37, 38], [41, 42]]
    part.zero_()
    assert local[1, 3:5, 1:3].sum() == 0


def test_a_vector_is_a_matrix_of_one_column() -> None:
    bias = torch.arange(6)
    piece = Piece(Rect("b", 4, 0, 3, 1), row=1)
    assert view(bias, piece, Rect("b", 5, 0, 2, 1)).tolist() == [[2], [3]]
