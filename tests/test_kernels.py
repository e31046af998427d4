"""The fused step and its noise: held against published numbers, float64 formulas and the row-by-row reference."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from fused_step_cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.kernels import (
    BoundStep,
    StepRow,
    fused_step,
    native_step,
    normals,
    pack_rows,
    row_dtype,
    step_numpy,
    step_reference,
)
from fewstep.kernels.fused_step import Scratch
from fewstep.kernels.noise import philox

Array = NDArray[Any]
ONES, PI_DIGITS = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ONES, ONES[:2], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI_DIGITS, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers of Random123, tests/kat_vectors, philox4x32 with 10 rounds."""
    c0, c1, c2, c3 = (np.array([word], np.uint64) for word in counter)
    got = philox(c0, c1, c2, c3, np.array([key[0] | key[1] << 32], np.uint64))
    assert [int(word[0]) for word in got] == words


def box_muller(seed: int, noise_id: int, num_elements: int) -> NDArray[np.float64]:
    """The normals by their definition, in float64 from the same words."""
    groups = -(-num_elements // 4)
    c0, c1 = np.arange(groups, dtype=np.uint64), np.full(groups, noise_id, np.uint64)
    zero = np.zeros(groups, np.uint64)
    words = philox(c0, c1, zero, zero, np.array([seed], np.uint64))
    out = np.empty((groups, 4))
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log(((words[pair] >> 8) + 1.0) / 2**24))
        quadrant, offset = words[pair + 1] >> 30, (words[pair + 1] >> 8 & 0x3FFFFF) / 2**22 - 0.5
        angle = np.pi / 2 * (quadrant + offset)
        out[:, pair], out[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return out.reshape(-1)[:num_elements]


@pytest.mark.parametrize(("seed", "noise_id"), [(0, 0), (7, 3), (2**64 - 1, 2**32 - 1), (1 << 32, 1)])
def test_normals_are_box_muller_to_1e_6(seed: int, noise_id: int) -> None:
    got = normals(np.array([seed], np.uint64), np.array([noise_id], np.uint32), 100_001)
    assert np.abs(got[0] - box_muller(seed, noise_id, 100_001)).max() <= 1e-6


def test_normals_have_the_moments_of_a_normal() -> None:
    """Within four standard errors, of 2**20 draws."""
    z = normals(np.array([11], np.uint64), np.array([1], np.uint32), 1 << 20)[0].astype(np.float64)
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert np.abs(z).max() < 5.77


def test_normals_pass_kolmogorov_smirnov() -> None:
    """Across elements, across seeds and across noise numbers: each is an axis of the counter."""
    ids = np.arange(20_000)
    across = {
        "elements": normals(np.array([5], np.uint64), np.array([0]), 20_000)[0],
        "seeds": normals(ids.astype(np.uint64), np.zeros_like(ids), 1)[:, 0],
        "noise numbers": normals(np.full(20_000, 5, np.uint64), ids, 1)[:, 0],
    }
    for axis, z in across.items():
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-3, axis


def test_noises_of_different_seed_number_and_element_are_uncorrelated() -> None:
    z = normals(np.array([1, 2, 1 << 32, 1], np.uint64), np.array([1, 1, 1, 2]), 100_000).astype(np.float64)
    correlation = np.corrcoef([*z, np.roll(z[0], 1), np.roll(z[0], 2)]) - np.eye(6)
    assert np.abs(correlation).max() < 5 / 100_000**0.5


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
    num_elements=st.sampled_from([1, 2, 3, 4, 5, 64, 783, 784]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_rows_noise_does_not_depend_on_its_company(seeds: list[int], num_elements: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(seeds), max_size=len(seeds)))
    together = normals(np.array(seeds, np.uint64), np.array(ids, np.uint32), num_elements)
    for i, (seed, noise_id) in enumerate(zip(seeds, ids, strict=True)):
        alone = normals(np.array([seed], np.uint64), np.array([noise_id], np.uint32), num_elements)
        assert np.array_equal(together[i], alone[0])


def test_a_longer_row_begins_with_the_shorter_one() -> None:
    """Also past the chunk in which the work is done."""
    seed, noise_id = np.array([3, 4], np.uint64), np.array([0, 1])
    long = normals(seed, noise_id, 200_003)
    for length in (1, 6, 65_536, 65_537, 150_001):
        assert np.array_equal(normals(seed, noise_id, length), long[:, :length])


def test_normals_fill_out_and_nothing_else() -> None:
    memory = np.full((5, 7), np.nan, np.float32)
    given_back = normals(np.array([1, 2], np.uint64), np.array([0, 0]), 7, out=memory[1:3])
    assert given_back.base is memory
    assert np.array_equal(memory[1:3], normals(np.array([1, 2], np.uint64), np.array([0, 0]), 7))
    assert np.isnan(memory[[0, 3, 4]]).all()


# --- the fused step


@given(**CASES)
@settings(max_examples=300, deadline=None)
def test_the_fused_step_is_the_reference_to_the_bit(
    seed: int, rows: int, elements: int, history: int, dtype: type[Any]
) -> None:
    case = Case(np.random.default_rng(seed), rows, elements, history, dtype)
    for got, wanted in zip(case.run(fused_step), case.run(step_reference), strict=True):
        assert got.tobytes() == wanted.tobytes()


@given(**CASES, before=st.integers(0, 3), behind=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_bound_step_moves_the_rows_it_is_told_and_no_others(
    seed: int, rows: int, elements: int, history: int, dtype: type[Any], before: int, behind: int
) -> None:
    """Bound once, to the arrays of a pool; the second call finds what the first one left, and each row on its next."""
    case = Case(np.random.default_rng(seed), rows, elements, history, dtype)
    alone: list[Array] = [
        array.copy() for array in (case.row, case.x, case.history, case.uncond, case.guidance, case.seed)
    ]
    alone.append(np.zeros((rows, elements), dtype))
    pool = [np.concatenate([array[:1].repeat(before, 0), array, array[:1].repeat(behind, 0)]) for array in alone]
    others = [np.delete(array, slice(before, before + rows), 0).tobytes() for array in pool]
    table = np.concatenate([case.table, case.table[:1]])  # for those who stand on the last row, one more
    move = BoundStep(table, *pool)
    for _ in range(2):
        step_reference(table, *[*alone[:3], case.raw, *alone[3:]])
        alone[0] += 1
        move(before, before + rows, case.raw)
    for got, wanted in zip(pool, alone, strict=True):
        assert got[before : before + rows].tobytes() == wanted.tobytes()
    assert [np.delete(array, slice(before, before + rows), 0).tobytes() for array in pool] == others


@pytest.mark.skipif(native_step() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("elements", [511, 512, 513, 1025, 2059])
def test_the_compiled_step_is_the_reference_in_every_block(elements: int) -> None:
    """Rows that read every term, each guided by another's output: numpy cannot step in unseen."""
    native = native_step()
    assert native is not None
    rng = np.random.default_rng(elements)
    rows = [StepRow(0.3, -0.7, -1, 1, 0.6, (0.3, -0.2), 0.1, 0.5, write_slot=i, noise_id=i) for i in range(2)]
    x, raw = rng.standard_normal((3, elements), np.float32), rng.standard_normal((6, elements), np.float32)
    history, network_input = rng.standard_normal((3, 2, elements), np.float32), np.empty_like(x)
    guidance, seed = np.array([2.5, 0.5, 4], np.float32), np.arange(3, dtype=np.uint64)
    row, uncond = np.array([0, 1, 0], np.int32), np.array([5, 3, 4], np.int32)
    wanted = x.copy(), history.copy(), network_input.copy()
    table = pack_rows(rows, 2)
    step_reference(table, row, *wanted[:2], raw, uncond, guidance, seed, wanted[2])
    native.step(table, row, x, history, raw, uncond, guidance, seed, network_input)
    for got, want in zip((x, history, network_input), wanted, strict=True):
        assert got.tobytes() == want.tobytes()
    noise, noise_id = np.empty_like(x), np.array([0, 7, 2**32 - 1], np.uint32)
    native.normals(seed, noise_id, noise)
    assert noise.tobytes() == normals(seed, noise_id, elements).tobytes()


@given(**CASES)
@settings(max_examples=100, deadline=None)
def test_what_must_not_be_read_is_not(seed: int, rows: int, elements: int, history: int, dtype: type[Any]) -> None:
    """NaN stands in every unused term of a `Case`; none comes out, and unwritten history keeps its own."""
    case = Case(np.random.default_rng(seed), rows, elements, history, dtype)
    for step in (fused_step, step_reference):
        x, kept, network_input = case.run(step)
        assert np.isfinite(x).all()
        assert np.isfinite(network_input).all()
        for i, slot in enumerate(case.table["write_slot"][case.row]):
            others = [k for k in range(history) if k != slot]
            assert kept[i, others].tobytes() == case.history[i, others].tobytes()
            assert slot < 0 or np.isfinite(kept[i, slot]).all()


@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_a_rows_step_does_not_depend_on_its_company(
    seed: int, rows: int, elements: int, history: int, dtype: type[Any]
) -> None:
    case = Case(np.random.default_rng(seed), rows, elements, history, dtype)
    together = case.run(fused_step)
    for i in range(rows):
        for one, all_ in zip(case.run(fused_step, [i]), together, strict=True):
            assert one[0].tobytes() == all_[i].tobytes()


def test_scratch_of_any_age_and_larger_size_changes_nothing() -> None:
    case = Case(np.random.default_rng(1), 5, 33, 4, np.float32)
    scratch = Scratch(9, 33)
    for array in (scratch.y, scratch.term, scratch.m):
        array[...] = np.nan
    for got, wanted in zip(case.run(step_numpy, scratch=scratch), case.run(fused_step), strict=True):
        assert got.tobytes() == wanted.tobytes()


def test_the_formula() -> None:
    """Equation (1) in float64, within the float32 rounding of its seven terms."""
    row = StepRow(0.7, -1.2, -0.8, 0.8, a=0.9, b=(0.3, -0.4), c=0.6, c_in=0.5, write_slot=1, noise_id=9)
    rng = np.random.default_rng(0)
    x, kept = rng.standard_normal((1, 50), np.float32), rng.standard_normal((1, 2, 50), np.float32)
    raw, seed = rng.standard_normal((2, 50), np.float32), np.array([12], np.uint64)
    m = np.clip(0.7 * x[0].astype(float) - 1.2 * (raw[1] + 3.0 * (raw[0].astype(float) - raw[1])), -0.8, 0.8)
    noise = normals(seed, np.array([9]), 50)[0].astype(float)
    wanted = 0.9 * x[0].astype(float) + 0.3 * kept[0, 0].astype(float) - 0.4 * m + 0.6 * noise
    network_input = np.empty_like(x)
    guidance = np.array([3], np.float32)
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    fused_step(pack_rows([row], 2), zero, x, kept, raw, one, guidance, seed, network_input)
    bound = 8 * np.finfo(np.float32).eps * 10
    assert np.abs(kept[0, 1] - m).max() < bound
    assert np.abs(x[0] - wanted).max() < bound
    assert np.abs(network_input[0] - 0.5 * wanted).max() < bound


def test_the_start_row_writes_noise_number_0_over_anything() -> None:
    start = StepRow(0, 0, -np.inf, np.inf, a=0, b=(), c=80.0, c_in=0.25, write_slot=-1, noise_id=0)
    nan = np.full((3, 10), np.nan, np.float32)
    x, kept, network_input = nan.copy(), np.full((3, 2, 10), np.nan, np.float32), nan.copy()
    seed = np.array([1, 2, 3], np.uint64)
    zero, none = np.zeros(3, np.int32), np.full(3, -1, np.int32)
    fused_step(pack_rows([start], 2), zero, x, kept, nan, none, nan[:, 0], seed, network_input)
    wanted = np.float32(80) * normals(seed, np.zeros(3), 10)
    assert np.array_equal(x, wanted)
    assert np.array_equal(network_input, np.float32(0.25) * wanted)
    assert np.isnan(kept).all()


def test_an_infinite_guidance_partner_reaches_only_its_own_row() -> None:
    row = StepRow(0, 1, -np.inf, np.inf, a=0, b=(1.0,), c=0, c_in=1, write_slot=0, noise_id=0)
    raw = np.ones((3, 4), np.float32)
    raw[2] = np.nan
    x, kept, network_input = np.zeros((2, 4), np.float32), np.zeros((2, 1, 4), np.float32), np.zeros((2, 4), np.float32)
    fused_step(
        pack_rows([row], 1), np.zeros(2, np.int32), x, kept, raw, np.array([2, -1], np.int32),
        np.full(2, 2, np.float32), np.zeros(2, np.uint64), network_input,
    )  # fmt: skip
    assert np.isnan(x[0]).all()
    assert np.array_equal(x[1], raw[1])


@pytest.mark.parametrize("history", [1, 2, 4, 8])
def test_a_packed_row_has_the_size_its_docstring_says(history: int) -> None:
    assert row_dtype(history).itemsize == 40 + 4 * history


def test_a_table_row_that_needs_more_history_is_refused() -> None:
    row = StepRow(0, 1, -1, 1, 1, (0.5, 0.5, 0.5), 0, 1, write_slot=2, noise_id=1)
    with pytest.raises(ValueError, match=r"^table row 1 needs 3 history slots, not 2$"):
        pack_rows([StepRow(0, 1, -1, 1, 1, (), 0, 1, 0, 1), row], 2)
