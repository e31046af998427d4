// The arithmetic of the fused step: one source for every compiled build, host and device.
//
// Each product and each sum is rounded once, in the order written: no fused multiply-add anywhere (host builds
// pass -ffp-contract=off, the device build uses the _rn intrinsics). So all builds give the bits of step_reference.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FEWSTEP_FN static __host__ __device__ __forceinline__
#else
#define FEWSTEP_FN static inline __attribute__((always_inline))
#endif

typedef unsigned int fewstep_u32;
typedef unsigned long long fewstep_u64;

// One table row; kernels/fused_step.py, row_dtype. b[] has one weight for each history slot.
struct fewstep_row {
  float k_x, k_m, clip_min, clip_max, a, c, c_in, t;
  int write_slot;
  fewstep_u32 noise_id;
  float b[1];
};

#if defined(__CUDA_ARCH__)
FEWSTEP_FN float fs_mul(float a, float b) { return __fmul_rn(a, b); }
FEWSTEP_FN float fs_add(float a, float b) { return __fadd_rn(a, b); }
FEWSTEP_FN float fs_sqrt(float a) { return __fsqrt_rn(a); }
FEWSTEP_FN fewstep_u32 fs_mulhi(fewstep_u32 a, fewstep_u32 b) { return __umulhi(a, b); }
FEWSTEP_FN fewstep_u32 fs_bits(float f) { return __float_as_uint(f); }
FEWSTEP_FN float fs_float(fewstep_u32 u) { return __uint_as_float(u); }
#else
FEWSTEP_FN float fs_mul(float a, float b) { return a * b; }
FEWSTEP_FN float fs_add(float a, float b) { return a + b; }
FEWSTEP_FN float fs_sqrt(float a) { return __builtin_sqrtf(a); }
FEWSTEP_FN fewstep_u32 fs_mulhi(fewstep_u32 a, fewstep_u32 b) { return (fewstep_u32)(((fewstep_u64)a * b) >> 32); }
FEWSTEP_FN fewstep_u32 fs_bits(float f) { fewstep_u32 u; __builtin_memcpy(&u, &f, 4); return u; }
FEWSTEP_FN float fs_float(fewstep_u32 u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
#endif

// Philox4x32-10, Salmon et al. 2011: counter (c0, c1, c2, c3), key (k0, k1).
FEWSTEP_FN void fs_philox(fewstep_u32 c0, fewstep_u32 c1, fewstep_u32 c2, fewstep_u32 c3, fewstep_u32 k0,
                          fewstep_u32 k1, fewstep_u32* r) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 10; i++) {
    fewstep_u32 h0 = fs_mulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    fewstep_u32 h1 = fs_mulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  r[0] = c0;
  r[1] = c1;
  r[2] = c2;
  r[3] = c3;
}

// -ln(u) for u = ((word >> 8) + 1) / 2^24: the Cephes logf polynomial, unfused.
FEWSTEP_FN float fs_minus_log(fewstep_u32 word) {
  fewstep_u32 bits = fs_bits((float)(int)((word >> 8) + 1u));
  int exponent = (int)(bits >> 23) - (127 + 24);
  fewstep_u32 mantissa = (bits & 0x7fffffu) | 0x3f800000u;
  int above = mantissa >= 0x3fb504f3u;  // the square root of two
  exponent += above;
  float t = fs_add(fs_float(mantissa - (above ? 0x00800000u : 0u)), -1.0f), e = (float)exponent;
  float z = fs_mul(t, t), y = 7.0376836292e-2f;
  y = fs_add(fs_mul(y, t), -1.1514610310e-1f);
  y = fs_add(fs_mul(y, t), 1.1676998740e-1f);
  y = fs_add(fs_mul(y, t), -1.2420140846e-1f);
  y = fs_add(fs_mul(y, t), 1.4249322787e-1f);
  y = fs_add(fs_mul(y, t), -1.6668057665e-1f);
  y = fs_add(fs_mul(y, t), 2.0000714765e-1f);
  y = fs_add(fs_mul(y, t), -2.4999993993e-1f);
  y = fs_add(fs_mul(y, t), 3.3333331174e-1f);
  y = fs_mul(fs_mul(y, t), z);
  y = fs_add(y, fs_mul(e, -2.12194440e-4f));
  y = fs_add(y, fs_mul(z, -0.5f));
  return -fs_add(fs_add(t, y), fs_mul(e, 0.693359375f));
}

// Two normals from two words, Box-Muller; the angle is pi/2 * (quadrant + x), x in [-1/2, 1/2).
FEWSTEP_FN void fs_box_muller(fewstep_u32 radius_word, fewstep_u32 angle_word, float* n0, float* n1) {
  float radius = fs_sqrt(fs_mul(fs_minus_log(radius_word), 2.0f));
  float x = fs_add(fs_mul((float)(int)((angle_word >> 8) & 0x3fffffu), 2.384185791015625e-7f), -0.5f);
  float a = fs_mul(x, 1.57079632679f), z = fs_mul(a, a);
  float s = fs_add(fs_mul(z, -1.9515295891e-4f), 8.3321608736e-3f);
  s = fs_add(fs_mul(s, z), -1.6666654611e-1f);
  s = fs_add(fs_mul(fs_mul(s, z), a), a);
  float c = fs_add(fs_mul(z, 2.443315711809948e-5f), -1.388731625493765e-3f);
  c = fs_add(fs_mul(c, z), 4.166664568298827e-2f);
  c = fs_add(fs_add(fs_mul(fs_mul(c, z), z), fs_mul(z, -0.5f)), 1.0f);
  fewstep_u32 quadrant = angle_word >> 30;
  float cosine = (quadrant & 1u) ? s : c, sine = (quadrant & 1u) ? c : s;
  cosine = fs_float(fs_bits(cosine) ^ (((quadrant + 1u) & 2u) << 30));
  sine = fs_float(fs_bits(sine) ^ ((quadrant & 2u) << 30));
  *n0 = fs_mul(cosine, radius);
  *n1 = fs_mul(sine, radius);
}

// Elements 4 * group to 4 * group + 3 of noise number noise_id of a seed.
FEWSTEP_FN void fs_normal4(fewstep_u32 group, fewstep_u32 noise_id, fewstep_u64 seed, float* n) {
  fewstep_u32 r[4];
  fs_philox(group, noise_id, 0u, 0u, (fewstep_u32)seed, (fewstep_u32)(seed >> 32), r);
  fs_box_muller(r[0], r[1], n, n + 1);
  fs_box_muller(r[2], r[3], n + 2, n + 3);
}

FEWSTEP_FN float fs_guide(float conditional, float unconditional, float guidance) {
  return fs_add(fs_mul(fs_add(conditional, -unconditional), guidance), unconditional);
}

// NaN passes through.
FEWSTEP_FN float fs_clip(float m, float low, float high) {
  m = m < low ? low : m;
  return m > high ? high : m;
}
