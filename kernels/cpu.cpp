// The fused step on the CPU: kernels/fused_step.py, equation (1), row by row in blocks that stay in the first-level
// cache. Terms of weight zero are not read. Each batch row is counted on to its next table row. Built on first use by
// native.py; single-threaded.
#include "fewstep_step.h"

enum { BLOCK = 512 };  // elements; a multiple of 4

static void normals_block(fewstep_u32 first_group, fewstep_u32 noise_id, fewstep_u64 seed, int groups, float* out) {
  for (int i = 0; i < groups; i++) fs_normal4(first_group + i, noise_id, seed, out + 4 * i);
}

static inline void add_scaled(float* y, float weight, const float* term, int n) {
  for (int i = 0; i < n; i++) y[i] = fs_add(y[i], fs_mul(weight, term[i]));
}

extern "C" void fewstep_normals(const fewstep_u64* seed, const fewstep_u32* noise_id, long rows, long elements,
                                float* out) {
  float z[BLOCK];
  for (long r = 0; r < rows; r++)
    for (long e = 0; e < elements; e += BLOCK) {
      int n = (int)(elements - e < BLOCK ? elements - e : BLOCK);
      normals_block((fewstep_u32)(e / 4), noise_id[r], seed[r], (n + 3) / 4, z);
      __builtin_memcpy(out + r * elements + e, z, n * sizeof(float));
    }
}

extern "C" void fewstep_step(const char* table, long row_bytes, int* row, long first, long last, long elements,
                             long slots, float* x, float* history, const float* raw, const int* uncond,
                             const float* guidance, const fewstep_u64* seed, float* network_input) {
  float m[BLOCK], y[BLOCK], z[BLOCK];
  for (long r = first; r < last; r++) {
    const fewstep_row* w = (const fewstep_row*)(table + row_bytes * row[r]++);
    float* past = history + r * slots * elements;
    for (long e = 0; e < elements; e += BLOCK) {
      int n = (int)(elements - e < BLOCK ? elements - e : BLOCK);
      float* x_now = x + r * elements + e;
      if (w->write_slot >= 0) {
        for (int i = 0; i < n; i++) m[i] = 0.0f;
        if (w->k_x != 0.0f) add_scaled(m, w->k_x, x_now, n);
        if (w->k_m != 0.0f) {
          const float* conditional = raw + (r - first) * elements + e;
          if (uncond[r] >= 0) {
            const float* unconditional = raw + uncond[r] * elements + e;
            for (int i = 0; i < n; i++) z[i] = fs_guide(conditional[i], unconditional[i], guidance[r]);
            conditional = z;
          }
          add_scaled(m, w->k_m, conditional, n);
        }
        for (int i = 0; i < n; i++) m[i] = fs_clip(m[i], w->clip_min, w->clip_max);
        __builtin_memcpy(past + w->write_slot * elements + e, m, n * sizeof(float));
      }
      for (int i = 0; i < n; i++) y[i] = 0.0f;
      if (w->a != 0.0f) add_scaled(y, w->a, x_now, n);
      for (long k = 0; k < slots; k++)
        if (w->b[k] != 0.0f) add_scaled(y, w->b[k], past + k * elements + e, n);
      if (w->c != 0.0f) {
        normals_block((fewstep_u32)(e / 4), w->noise_id, seed[r], (n + 3) / 4, z);
        add_scaled(y, w->c, z, n);
      }
      __builtin_memcpy(x_now, y, n * sizeof(float));
      float* next = network_input + r * elements + e;
      for (int i = 0; i < n; i++) next[i] = fs_mul(w->c_in, y[i]);
    }
  }
}
