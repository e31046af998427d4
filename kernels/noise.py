"""Counter-based standard normals: the same numbers whoever shares the batch, on any device.

Element ``e`` of noise number ``k`` of a request with seed ``s`` is a pure function of ``(s, k, e)``:

    words   = Philox4x32-10(counter = (e // 4, k, 0, 0), key = (s mod 2^32, s div 2^32))
    normals = Box-Muller on words (0, 1) and on words (2, 3)

so nothing is drawn in order and nothing has to be stored. Logarithm, sine and cosine are polynomials
in float32 with only ``+``, ``*``, square root and bit operations, each rounded once (no fused
multiply-add): a C or CUDA build that keeps to these lines gives the same bits.

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Polynomials: Cephes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Array = NDArray[Any]

_CHUNK = 16384  # four-element groups worked on at a time: the temporaries stay in the second-level cache

_f = np.float32
_u = np.uint32
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def normals(seed: Array, noise_id: Array, num_elements: int, out: Floats | None = None) -> Floats:
    """Standard normal noise for several rows.

    Args:
        seed: ``[rows]`` uint64, one per request.
        noise_id: ``[rows]`` unsigned integers below 2**32; 0 is the initial latent.
        num_elements: elements in a row.
        out: ``[rows, num_elements]`` float32 to write to, C-contiguous rows; allocated when left out.

    Returns:
        ``out``, ``[rows, num_elements]`` float32. The largest magnitude is 5.77 (24-bit uniforms).
    """
    rows = len(seed)
    if out is None:
        out = np.empty((rows, num_elements), np.float32)
    groups = -(-num_elements // 4)
    rows_at_once = max(1, _CHUNK // groups)
    for first in range(0, rows, rows_at_once):
        part = slice(first, min(first + rows_at_once, rows))
        key = np.asarray(seed[part], np.uint64)[:, None]
        number = np.asarray(noise_id[part], np.uint64)[:, None]
        for start in range(0, groups, _CHUNK):
            counter = np.arange(start, min(start + _CHUNK, groups), dtype=np.uint64)[None, :]
            words = philox(counter, number, np.uint64(0), np.uint64(0), key)
            four = np.empty((*words[0].shape, 4), np.float32)
            four[..., 0], four[..., 1] = _box_muller(words[0], words[1])
            four[..., 2], four[..., 3] = _box_muller(words[2], words[3])
            stop = min(4 * (start + _CHUNK), num_elements)
            out[part, 4 * start : stop] = four.reshape(len(four), -1)[:, : stop - 4 * start]
    return out


def philox(
    c0: Array, c1: Array | np.uint64, c2: Array | np.uint64, c3: Array | np.uint64, key: Array | np.uint64
) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10: four 32-bit words for each 128-bit counter and 64-bit key.

    Args:
        c0: lowest counter word, uint64 array with values below 2**32; the others broadcast against it.
        c1: second counter word.
        c2: third counter word.
        c3: highest counter word.
        key: uint64.

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    k0, k1 = key & _LOW, key >> _32
    w0: Any = c0
    w1: Any = c1
    w2: Any = c2
    w3: Any = c3
    for _ in range(10):
        p0, p1 = w0 * _MULTIPLIER_0, w2 * _MULTIPLIER_1
        w0, w1, w2, w3 = (p1 >> _32) ^ w1 ^ k0, p1 & _LOW, (p0 >> _32) ^ w3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    shape = np.broadcast_shapes(*(np.shape(w) for w in (w0, w1, w2, w3)))
    a, b, c, d = (np.broadcast_to(w, shape).astype(np.uint32) for w in (w0, w1, w2, w3))
    return a, b, c, d


def _minus_log(word: Array) -> Floats:
    """``-ln(u)`` for ``u = ((word >> 8) + 1) / 2^24``: the Cephes logf polynomial, unfused."""
    bits = ((word >> _u(8)) + _u(1)).astype(np.float32).view(np.uint32)
    exponent = (bits >> _u(23)).astype(np.int32) - np.int32(127 + 24)
    mantissa = (bits & _u(0x7FFFFF)) | _u(0x3F800000)
    above_root_two = mantissa >= _u(0x3FB504F3)
    exponent += above_root_two
    mantissa -= above_root_two * _u(0x00800000)
    t = mantissa.view(np.float32)
    t += _f(-1)
    e = exponent.astype(np.float32)
    z = t * t
    y = np.full_like(t, 7.0376836292e-2)
    for coefficient in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        y *= t
        y += _f(coefficient)
    y *= t
    y *= z
    y += e * _f(-2.12194440e-4)
    y += z * _f(-0.5)
    t += y
    t += e * _f(0.693359375)
    return np.negative(t, out=t)


def _box_muller(radius_word: Array, angle_word: Array) -> tuple[Floats, Floats]:
    """Two normals from two words. The angle is pi/2 * (quadrant + x), x in [-1/2, 1/2)."""
    radius = np.sqrt(_minus_log(radius_word) * _f(2))
    x = ((angle_word >> _u(8)) & _u(0x3FFFFF)).astype(np.float32)
    x *= _f(2.0**-22)
    x += _f(-0.5)
    a = x * _f(1.57079632679)
    z = a * a
    s = z * _f(-1.9515295891e-4)
    s += _f(8.3321608736e-3)
    s *= z
    s += _f(-1.6666654611e-1)
    s *= z
    s *= a
    s += a
    c = z * _f(2.443315711809948e-5)
    c += _f(-1.388731625493765e-3)
    c *= z
    c += _f(4.166664568298827e-2)
    c *= z
    c *= z
    c += z * _f(-0.5)
    c += _f(1)
    quadrant = angle_word >> _u(30)
    odd = (quadrant & _u(1)).astype(bool)
    cosine, sine = np.where(odd, s, c), np.where(odd, c, s)
    cosine.view(np.uint32)[...] ^= ((quadrant + _u(1)) & _u(2)) << _u(30)
    sine.view(np.uint32)[...] ^= (quadrant & _u(2)) << _u(30)
    cosine *= radius
    sine *= radius
    return cosine, sine
