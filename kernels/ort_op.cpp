// fewstep::FewStepUpdate as an ONNX Runtime custom operator on the CPU: one pass in the place of the function body
// that the graph carries, to the same bits. export/update_op.py has the operator's definition.
//
// No pip package of ONNX Runtime ships its C header, so the part of the C ABI that one operator needs stands here.
// The function table is append-only, a function's index is its place in it, and all used here exist since version 1.
#include <cstddef>
#include <cstdint>

#include "fewstep_step.h"

typedef void* Status;  // null: fine
struct ApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
enum {
  CREATE_CUSTOM_OP_DOMAIN = 26,
  CUSTOM_OP_DOMAIN_ADD = 27,
  ADD_CUSTOM_OP_DOMAIN = 28,
  GET_TENSOR_MUTABLE_DATA = 51,
  GET_DIMENSIONS_COUNT = 61,
  GET_DIMENSIONS = 62,
  GET_TENSOR_TYPE_AND_SHAPE = 65,
  KERNEL_CONTEXT_GET_INPUT = 90,
  KERNEL_CONTEXT_GET_OUTPUT = 91,
  RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99
};
struct CustomOp {  // OrtCustomOp as of version 8
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* const* api, const void* info);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, void* context);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
};
template <class F>
static F function(const void* const* api, int index) { return (F)api[index]; }

struct Shape {
  size_t count;
  int64_t sizes[8];
};

static float* input(const void* const* api, void* context, size_t i, Shape* shape) {
  const void* value;
  void *info, *data;
  function<Status (*)(void*, size_t, const void**)>(api, KERNEL_CONTEXT_GET_INPUT)(context, i, &value);
  function<Status (*)(const void*, void**)>(api, GET_TENSOR_TYPE_AND_SHAPE)(value, &info);
  function<Status (*)(const void*, size_t*)>(api, GET_DIMENSIONS_COUNT)(info, &shape->count);
  if (shape->count > 8) shape->count = 8;
  function<Status (*)(const void*, int64_t*, size_t)>(api, GET_DIMENSIONS)(info, shape->sizes, shape->count);
  function<void (*)(void*)>(api, RELEASE_TENSOR_TYPE_AND_SHAPE_INFO)(info);
  function<Status (*)(void*, void**)>(api, GET_TENSOR_MUTABLE_DATA)((void*)value, &data);
  return (float*)data;
}

static float* output(const void* const* api, void* context, size_t i, const Shape& shape) {
  void *value, *data;
  function<Status (*)(void*, size_t, const int64_t*, size_t, void**)>(api, KERNEL_CONTEXT_GET_OUTPUT)(
      context, i, shape.sizes, shape.count, &value);
  function<Status (*)(void*, void**)>(api, GET_TENSOR_MUTABLE_DATA)(value, &data);
  return (float*)data;
}

struct Kernel {
  const void* const* api;
};

// x, raw, noise [rows, ...], history [rows, slots, ...], weights [rows, 8 + 2 * slots] -> x, history, network_input
static void compute(void* kernel, void* context) {
  const void* const* api = ((Kernel*)kernel)->api;
  Shape shape, other, past, columns;
  const float* x = input(api, context, 0, &shape);
  const float* raw = input(api, context, 1, &other);
  const float* noise = input(api, context, 2, &other);
  const float* history = input(api, context, 3, &past);
  const float* weights = input(api, context, 4, &columns);
  float* x_out = output(api, context, 0, shape);
  float* history_out = output(api, context, 1, past);
  float* network_input = output(api, context, 2, shape);
  long rows = shape.sizes[0], slots = past.sizes[1], elements = 1;
  for (size_t i = 1; i < shape.count; i++) elements *= shape.sizes[i];
  enum { BLOCK = 512 };
  float m[BLOCK], y[BLOCK];
  for (long r = 0; r < rows; r++) {
    const float* w = weights + r * (8 + 2 * slots);  // k_x, k_m, clip_min, clip_max, a, c, c_in, t, b..., writes...
    for (long e = 0; e < elements; e += BLOCK) {
      int n = (int)(elements - e < BLOCK ? elements - e : BLOCK);
      long at = r * elements + e;
      for (int i = 0; i < n; i++) {
        m[i] = fs_add(fs_mul(w[0], x[at + i]), fs_mul(w[1], raw[at + i]));
        m[i] = fs_clip(m[i], w[2], w[3]);
        y[i] = fs_mul(w[4], x[at + i]);
      }
      for (long k = 0; k < slots; k++) {
        const float* old = history + (r * slots + k) * elements + e;
        float* kept = history_out + (r * slots + k) * elements + e;
        const float* now = w[8 + slots + k] != 0.0f ? m : old;
        for (int i = 0; i < n; i++) {
          y[i] = fs_add(y[i], fs_mul(w[8 + k], now[i]));
          kept[i] = now[i];
        }
      }
      for (int i = 0; i < n; i++) {
        x_out[at + i] = y[i] = fs_add(y[i], fs_mul(w[5], noise[at + i]));
        network_input[at + i] = fs_mul(w[6], y[i]);
      }
    }
  }
}

static void* create(const CustomOp*, const void* const* api, const void*) { return new Kernel{api}; }
static void destroy(void* kernel) { delete (Kernel*)kernel; }
static const char* name(const CustomOp*) { return "FewStepUpdate"; }
static const char* provider(const CustomOp*) { return nullptr; }  // the CPU's
static int is_float(const CustomOp*, size_t) { return 1; }
static int is_required(const CustomOp*, size_t) { return 0; }
static size_t five(const CustomOp*) { return 5; }
static size_t three(const CustomOp*) { return 3; }
static CustomOp op = {8,     create,  name,    provider,    is_float,   five, is_float,
                      three, compute, destroy, is_required, is_required};

extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const ApiBase* base) {
  const void* const* api = base->GetApi(8);
  void* domain;  // never freed: it must outlive every session
  Status status = function<Status (*)(const char*, void**)>(api, CREATE_CUSTOM_OP_DOMAIN)("fewstep", &domain);
  if (!status) status = function<Status (*)(void*, const CustomOp*)>(api, CUSTOM_OP_DOMAIN_ADD)(domain, &op);
  if (!status) status = function<Status (*)(void*, void*)>(api, ADD_CUSTOM_OP_DOMAIN)(options, domain);
  return status;
}
