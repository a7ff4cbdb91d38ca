"""Names of schemes say everything that a scheme is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_lightning.errors import RequestError
from aq_lightning.scheme import Grid, Scheme

NAMES = st.builds(
    lambda weight, activation, cache, group, symmetry: f"w{weight}a{activation}{cache}{group}{symmetry}",
    st.integers(2, 8),
    st.sampled_from([2, 3, 4, 6, 8, 16]),
    st.sampled_from(["", "kv2", "kv4", "kv8", "kv3x32", "kv4x128", "kv4static", "kv2staticx32"]),
    st.one_of(st.just(""), st.integers(1, 4096).map(lambda size: f"g{size}")),
    st.sampled_from(["", "sym"]),
)


@given(NAMES)
def test_name_round_trip(name: str) -> None:
    assert str(Scheme.parse(name)) == name


def test_what_a_name_means() -> None:
    assert Scheme.parse("w3a16g64") == Scheme(Grid(3, 64), None)
    assert Scheme.parse("w4a4") == Scheme(Grid(4), Grid(4, symmetric=True))
    assert Scheme.parse("w4a4kv4") == Scheme(Grid(4), Grid(4, symmetric=True), Grid(4))
    assert Scheme.parse("w4a16kv3x32g64") == Scheme(Grid(4, 64), None, Grid(3, 32))
    assert Scheme.parse("w4a4kv4staticsym") == Scheme(
        Grid(4, symmetric=True), Grid(4, symmetric=True), Grid(4), static_cache=True
    )
    assert Scheme.parse("w8a8g128sym") == Scheme(Grid(8, 128, symmetric=True), Grid(8, symmetric=True))


@pytest.mark.parametrize(
    "name", ["", "w4", "a4", "w4a", "w4a16g", "w4a16sym32", "w4a16g-1", " w4a16", "w4a16\n", "w1a16", "w9a16", "w4a1",
             "w4a15", "w4a17", "w4a4kv", "w4a4kv1", "w4a4kv16", "w4a4kv4x",
             "w4a4static", "w4a4kv4x8static", "w4a4g32kv4", "w4a16g0", "w04.5a16"]
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="got"):
        Scheme.parse(name)


def test_activations_have_no_groups() -> None:
    with pytest.raises(RequestError, match="per token"):
        Scheme(Grid(4), Grid(4, 32))
    with pytest.raises(RequestError, match="asymmetric grids"):
        Scheme(Grid(4), None, Grid(4, symmetric=True))
    with pytest.raises(RequestError, match="got none rounded"):
        Scheme(Grid(4), static_cache=True)


@given(st.integers(1, 512), st.integers(1, 512))
def test_groups_cover_a_row_or_are_refused(width: int, size: int) -> None:
    if width % size:
        with pytest.raises(RequestError, match=f"divide the {width} input channels.*got {size}"):
            Grid(4, size).groups(width)
    else:
        assert Grid(4, size).groups(width) * size == width
    assert Grid(4).groups(width) == 1
