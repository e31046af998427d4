// The fused step on CUDA: kernels/fused_step.py, equation (1), in one pass over the batch.
//
// A thread moves WIDTH neighbouring elements of one row: 16 bytes of what the network says, and as many elements of
// x and of the history, which are float32 always. All of a thread's loads are issued before the first is used. What
// has weight zero is not read: the branches depend on the row alone, so no warp diverges. Noise is made where c != 0.
//
// Two kernels for each history depth: `whole` reads and writes 16 bytes at once, and needs 16-byte aligned arrays and
// elements that are a multiple of WIDTH; `any` reads and writes single elements. Both give the same bits.
//
// Compiled with FEWSTEP_NETWORK, the network's dtype (0 float32, 1 float16, 2 bfloat16), and FEWSTEP_FAST_NOISE.
// No header but ours, so that NVRTC compiles it on a machine without the CUDA toolkit.
#include "fewstep_step.h"

#define FEWSTEP_DEVICE static __device__ __forceinline__

#if FEWSTEP_NETWORK == 0
enum { WIDTH = 4 };
typedef float fs_stored;
#else
enum { WIDTH = 8 };
typedef unsigned short fs_stored;
#if FEWSTEP_NETWORK == 2
FEWSTEP_DEVICE float fs_widen(fs_stored v) { return fs_float((fewstep_u32)v << 16); }
FEWSTEP_DEVICE fs_stored fs_narrow(float f) {  // to nearest, ties to even; NaN stays NaN
  fewstep_u32 bits = fs_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (fs_stored)((bits >> 16) | 0x40u);
  return (fs_stored)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#elif defined(__CUDACC__) || defined(__CUDACC_RTC__)
FEWSTEP_DEVICE float fs_widen(fs_stored v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
FEWSTEP_DEVICE fs_stored fs_narrow(float f) {
  fs_stored v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
#else  // a C++ compiler, in the tests
FEWSTEP_DEVICE float fs_widen(fs_stored v) { _Float16 h; __builtin_memcpy(&h, &v, 2); return (float)h; }
FEWSTEP_DEVICE fs_stored fs_narrow(float f) { _Float16 h = (_Float16)f; fs_stored v; __builtin_memcpy(&v, &h, 2); return v; }
#endif
#endif

#if FEWSTEP_FAST_NOISE
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
FEWSTEP_DEVICE float fs_fast_sqrt(float a) {
  float f;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(f) : "f"(a));
  return f;
}
FEWSTEP_DEVICE float fs_fast_log(float a) { return __logf(a); }
FEWSTEP_DEVICE float fs_fast_sin(float a) { return __sinf(a); }
FEWSTEP_DEVICE float fs_fast_cos(float a) { return __cosf(a); }
#else
FEWSTEP_DEVICE float fs_fast_sqrt(float a) { return __builtin_sqrtf(a); }
FEWSTEP_DEVICE float fs_fast_log(float a) { return __builtin_logf(a); }
FEWSTEP_DEVICE float fs_fast_sin(float a) { return __builtin_sinf(a); }
FEWSTEP_DEVICE float fs_fast_cos(float a) { return __builtin_cosf(a); }
#endif

// fs_box_muller with the processor's own logarithm, sine and cosine, from the same two words.
FEWSTEP_DEVICE void fs_fast_box_muller(fewstep_u32 radius_word, fewstep_u32 angle_word, float* n0, float* n1) {
  float minus_log = -fs_fast_log((float)(int)((radius_word >> 8) + 1u) * 5.9604644775390625e-8f);
  float radius = fs_fast_sqrt(2.0f * (minus_log > 0.0f ? minus_log : 0.0f));  // near u = 1 the logarithm may err past 0
  float x = (float)(int)((angle_word >> 8) & 0x3fffffu) * 2.384185791015625e-7f - 0.5f;
  float angle = 1.57079632679f * ((float)((int)angle_word >> 30) + x);  // quadrants -2 to 1: angles near zero
  *n0 = radius * fs_fast_cos(angle);
  *n1 = radius * fs_fast_sin(angle);
}
#endif

FEWSTEP_DEVICE void fs_noise4(fewstep_u32 group, fewstep_u32 noise_id, fewstep_u64 seed, float* n) {
#if FEWSTEP_FAST_NOISE
  fewstep_u32 r[4];
  fs_philox(group, noise_id, 0u, 0u, (fewstep_u32)seed, (fewstep_u32)(seed >> 32), r);
  fs_fast_box_muller(r[0], r[1], n, n + 1);
  fs_fast_box_muller(r[2], r[3], n + 2, n + 3);
#else
  fs_normal4(group, noise_id, seed, n);
#endif
}

// Up to WIDTH elements, n of them inside the row.
template <bool WHOLE>
FEWSTEP_DEVICE void fs_load(const float* p, int n, float* v) {
  if (WHOLE) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      float4 q = *(const float4*)(p + i);
      v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = i < n ? p[i] : 0.0f;
  }
}

template <bool WHOLE>
FEWSTEP_DEVICE void fs_store(float* p, int n, const float* v) {
  if (WHOLE) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) *(float4*)(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      if (i < n) p[i] = v[i];
  }
}

#if FEWSTEP_NETWORK != 0
template <bool WHOLE>
FEWSTEP_DEVICE void fs_load(const fs_stored* p, int n, float* v) {
  if (WHOLE) {
    uint4 q = *(const uint4*)p;
    const fewstep_u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v[2 * i] = fs_widen((fs_stored)(words[i] & 0xffffu));
      v[2 * i + 1] = fs_widen((fs_stored)(words[i] >> 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = i < n ? fs_widen(p[i]) : 0.0f;
  }
}

template <bool WHOLE>
FEWSTEP_DEVICE void fs_store(fs_stored* p, int n, const float* v) {
  if (WHOLE) {
    fewstep_u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = fs_narrow(v[2 * i]) | (fewstep_u32)fs_narrow(v[2 * i + 1]) << 16;
    *(uint4*)p = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      if (i < n) p[i] = fs_narrow(v[i]);
  }
}
#endif

FEWSTEP_DEVICE void fs_add_scaled(float* y, float weight, const float* term) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) y[i] = fs_add(y[i], fs_mul(weight, term[i]));
}

// The arguments of fused_step, with the row size of `table` and the slots of `history` that numpy arrays carry along.
#define FEWSTEP_ARGUMENTS                                                                                            \
  const char *table, long long row_bytes, const int *row, long long elements, int slots, float *x, float *history,   \
      const fs_stored *raw, const int *uncond, const float *guidance, const fewstep_u64 *seed, fs_stored *network_input

// Grid: (threads for `elements`, rows). The first SLOTS history slots are loaded ahead; deeper ones one by one.
template <int SLOTS, bool WHOLE>
FEWSTEP_DEVICE void fs_step(FEWSTEP_ARGUMENTS) {
  const long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, r = blockIdx.y;
  if (e >= elements) return;
  const int n = elements - e < WIDTH ? (int)(elements - e) : (int)WIDTH;
  const fewstep_row* w = (const fewstep_row*)(table + row_bytes * row[r]);
  const float* b = w->b;
  const int write_slot = w->write_slot;
  const bool keeps = write_slot >= 0, uses_raw = keeps && w->k_m != 0.0f, uses_kx = keeps && w->k_x != 0.0f;
  const bool uses_x = w->a != 0.0f || uses_kx;
  const int partner = uses_raw ? uncond[r] : -1;
  float* past = history + r * slots * elements + e;

  float now[WIDTH], said[WIDTH], base[WIDTH], kept[SLOTS][WIDTH], m[WIDTH], y[WIDTH];
  if (uses_x) fs_load<WHOLE>(x + r * elements + e, n, now);
  if (uses_raw) fs_load<WHOLE>(raw + r * elements + e, n, said);
  if (partner >= 0) fs_load<WHOLE>(raw + partner * elements + e, n, base);
#pragma unroll
  for (int k = 0; k < SLOTS; k++)
    if (k < slots && k != write_slot && b[k] != 0.0f) fs_load<WHOLE>(past + k * elements, n, kept[k]);

#pragma unroll
  for (int i = 0; i < WIDTH; i++) m[i] = y[i] = 0.0f;
  if (keeps) {
    if (uses_kx) fs_add_scaled(m, w->k_x, now);
    if (partner >= 0) {
      const float scale = guidance[r];
#pragma unroll
      for (int i = 0; i < WIDTH; i++) said[i] = fs_guide(said[i], base[i], scale);
    }
    if (uses_raw) fs_add_scaled(m, w->k_m, said);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) m[i] = fs_clip(m[i], w->clip_min, w->clip_max);
    fs_store<WHOLE>(past + write_slot * elements, n, m);
  }
  if (w->a != 0.0f) fs_add_scaled(y, w->a, now);
#pragma unroll
  for (int k = 0; k < SLOTS; k++)
    if (k < slots && b[k] != 0.0f) {
      if (k == write_slot) fs_add_scaled(y, b[k], m);
      if (k != write_slot) fs_add_scaled(y, b[k], kept[k]);
    }
  for (int k = SLOTS; k < slots; k++)
    if (b[k] != 0.0f) {
      if (k != write_slot) fs_load<WHOLE>(past + k * elements, n, base);
      if (k == write_slot) fs_add_scaled(y, b[k], m);
      if (k != write_slot) fs_add_scaled(y, b[k], base);
    }
  if (w->c != 0.0f) {
    const float c = w->c;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      float z[4];
      fs_noise4((fewstep_u32)((e + i) / 4), w->noise_id, seed[r], z);
#pragma unroll
      for (int j = 0; j < 4; j++) y[i + j] = fs_add(y[i + j], fs_mul(c, z[j]));
    }
  }
  fs_store<WHOLE>(x + r * elements + e, n, y);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) y[i] = fs_mul(w->c_in, y[i]);
  fs_store<WHOLE>(network_input + r * elements + e, n, y);
}

#define FEWSTEP_KERNEL(SLOTS, ACCESS, WHOLE)                                                                  \
  extern "C" __global__ void __launch_bounds__(256) fewstep_step_##SLOTS##_##ACCESS(FEWSTEP_ARGUMENTS) {      \
    fs_step<SLOTS, WHOLE>(table, row_bytes, row, elements, slots, x, history, raw, uncond, guidance, seed,    \
                          network_input);                                                                     \
  }

FEWSTEP_KERNEL(1, whole, true)
FEWSTEP_KERNEL(2, whole, true)
FEWSTEP_KERNEL(4, whole, true)
FEWSTEP_KERNEL(8, whole, true)
FEWSTEP_KERNEL(1, any, false)
FEWSTEP_KERNEL(2, any, false)
FEWSTEP_KERNEL(4, any, false)
FEWSTEP_KERNEL(8, any, false)
