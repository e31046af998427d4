// fewstep::FewStepUpdate as one CUDA kernel, for a TensorRT plugin: the operator of export/update_op.py in one pass, to
// the bits of its function body. Arguments in the order that TensorRT gives them: inputs, sizes, outputs.
#include "fewstep_step.h"

enum { WIDTH = 4 };  // elements of a thread: 16 bytes

// A thread's elements of a row, at once where a row is a multiple of WIDTH; TensorRT's arrays are aligned.
static __device__ __forceinline__ void fs_load(const float* p, int n, bool whole, float* v) {
  if (whole) {
    float4 q = *(const float4*)p;
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = i < n ? p[i] : 0.0f;
  }
}

static __device__ __forceinline__ void fs_store(float* p, int n, bool whole, const float* v) {
  if (whole) {
    *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      if (i < n) p[i] = v[i];
  }
}

// Grid: (threads for `elements`, rows). A row of weights is k_x, k_m, clip_min, clip_max, a, c, c_in, t, b..., writes...
extern "C" __global__ void __launch_bounds__(256)
    fewstep_update(const float* x, const float* raw, const float* noise, const float* history, const float* weights,
                   int elements, int slots, float* x_out, float* history_out, float* network_input) {
  const long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, r = blockIdx.y;
  if (e >= elements) return;
  const int n = elements - e < WIDTH ? (int)(elements - e) : (int)WIDTH;
  const bool whole = elements % WIDTH == 0;
  const float* w = weights + r * (8 + 2 * slots);
  const long long at = r * elements + e;

  float now[WIDTH], m[WIDTH], y[WIDTH], other[WIDTH];
  fs_load(x + at, n, whole, now);
  fs_load(raw + at, n, whole, other);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    m[i] = fs_clip(fs_add(fs_mul(w[0], now[i]), fs_mul(w[1], other[i])), w[2], w[3]);
    y[i] = fs_mul(w[4], now[i]);
  }
  for (int k = 0; k < slots; k++) {
    const long long slot = (r * slots + k) * elements + e;
    if (w[8 + slots + k] > 0.5f) {
#pragma unroll
      for (int i = 0; i < WIDTH; i++) other[i] = m[i];
    } else {
      fs_load(history + slot, n, whole, other);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) y[i] = fs_add(y[i], fs_mul(w[8 + k], other[i]));
    fs_store(history_out + slot, n, whole, other);
  }
  fs_load(noise + at, n, whole, other);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    y[i] = fs_add(y[i], fs_mul(w[5], other[i]));
    now[i] = fs_mul(w[6], y[i]);
  }
  fs_store(x_out + at, n, whole, y);
  fs_store(network_input + at, n, whole, now);
}
