// Launchers of the hooked linear kernels: workspace layout, grid, and the choice of types. See hooked_linear.h.
#include "hooked_linear_scope.cuh"
#include "hooked_linear_decode.cuh"

namespace comeba {
namespace {

// Cuts a workspace into aligned parts; with a null base it only measures.
struct Carver {
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(size_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return part;
  }
};

// The counters come first: only they must be zero when a kernel starts.
struct ScopeLayout {
  ScopeProgress progress;
  unsigned* count;
  int* listed;
  size_t zeroed, bytes;
};

ScopeLayout scope_layout(void* workspace, int tokens, int batch) {
  Carver carver{static_cast<char*>(workspace)};
  ScopeLayout layout{};
  layout.progress.ticket = carver.take<unsigned>(1);
  layout.count = carver.take<unsigned>(1);
  layout.progress.counted = carver.take<unsigned>(batch);
  layout.progress.settled = carver.take<unsigned>(batch);
  layout.zeroed = carver.used;
  layout.progress.norms = carver.take<float>(tokens);
  layout.progress.deviations = carver.take<Deviation>(batch);
  layout.listed = carver.take<int>(tokens);
  layout.bytes = carver.used;
  return layout;
}

struct DecodeLayout {
  DecodeProgress progress;
  void* edits;
  size_t zeroed, bytes;
};

DecodeLayout decode_layout(void* workspace, int tokens, int d_out, int sketch_rows, size_t item) {
  Carver carver{static_cast<char*>(workspace)};
  DecodeLayout layout{};
  layout.progress.ticket = carver.take<unsigned>(1);
  layout.progress.counted = carver.take<unsigned>(1);
  layout.progress.settled = carver.take<unsigned>(1);
  layout.zeroed = carver.used;
  const size_t tiles = sketch_rows > 0 ? (sketch_rows + 15) / 16 : (d_out + 7) / 8;
  layout.progress.partial = carver.take<float>(tiles * tokens);
  layout.progress.norms = carver.take<float>(tokens);
  layout.progress.scope = carver.take<unsigned char>(tokens);
  layout.edits = carver.take<char>(sketch_rows > 0 ? 0 : static_cast<size_t>(tokens) * d_out * item);
  layout.bytes = carver.used;
  return layout;
}

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename T, typename Action>
cudaError_t launch_scope(const T* response, int width, Decision d, const ScopeLayout& layout, Action action,
                         cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(layout.progress.ticket, 0, layout.zeroed, stream);
  if (error != cudaSuccess) return error;
  const int tiles = (d.batch * d.seq + kWarps - 1) / kWarps, resident = 8 * multiprocessors();
  return launch(scope_kernel<T, Action>, dim3(tiles < resident ? tiles : resident), dim3(kThreads), 0, stream, response,
                width, d, layout.progress, action);
}

template <typename T>
cudaError_t launch_add_edits(Values output, const T* x, const T* delta, const ScopeLayout& layout, int d_in, int d_out,
                             cudaStream_t stream) {
  const int tiles = (d_out + 15) / 16, resident = 2 * multiprocessors();
  return launch(add_edits_kernel<T>, dim3(tiles < resident ? tiles : resident), dim3(kThreads), 0, stream, output, x,
                delta, static_cast<const int*>(layout.listed), static_cast<const unsigned*>(layout.count), d_in, d_out);
}

template <typename T, int NT>
cudaError_t launch_decode(T* output, const T* x, const T* weight, const T* bias, const T* delta, const T* sketch, int d_in,
                          int d_out, int sketch_rows, Decision d, const DecodeLayout& layout, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(layout.progress.ticket, 0, layout.zeroed, stream);
  if (error != cudaSuccess) return error;
  // As many blocks as tiles: the hardware keeps them coming, and tickets put them in order.
  if (sketch != nullptr) {
    const int rows = Shape<NT>::kTiles * 16, tiles = (sketch_rows + rows - 1) / rows + (d_out + rows - 1) / rows;
    return launch(decode_gated_kernel<T, NT>, dim3(tiles), dim3(kThreads), 0, stream, output, x, weight, bias, delta,
                  sketch, d_in, d_out, sketch_rows, d, layout.progress);
  }
  const int rows = Shape<NT>::kTiles * 8, tiles = (d_out + rows - 1) / rows;
  return launch(decode_exact_kernel<T, NT>, dim3(tiles), dim3(kThreads), 0, stream, output, x, weight, bias, delta,
                static_cast<T*>(layout.edits), d_in, d_out, d, layout.progress);
}

}  // namespace

size_t exact_hook_workspace(int tokens, int batch) { return scope_layout(nullptr, tokens, batch).bytes; }
size_t gated_hook_workspace(int tokens, int batch) { return scope_layout(nullptr, tokens, batch).bytes; }
size_t add_edits_workspace(int tokens) { return scope_layout(nullptr, tokens, 0).bytes; }
size_t decode_hook_workspace(int tokens, int d_out, int sketch_rows, DType type) {
  return decode_layout(nullptr, tokens, d_out, sketch_rows, type == DType::f32 ? 4 : 2).bytes;
}

const char* exact_hook(DType output_type, void* output, DType edit_type, const void* edit, int d_out, Decision d,
                       void* workspace, void* stream) {
  const ScopeLayout layout = scope_layout(workspace, d.batch * d.seq, d.batch);
  return with_type(edit_type, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(edit);
    const AddEdit<T> action{{output, output_type}, from, d_out};
    return reason(launch_scope(from, d_out, d, layout, action, static_cast<cudaStream_t>(stream)));
  });
}

const char* gated_hook(DType output_type, void* output, DType type, const void* x, const void* delta, const void* response,
                       int d_in, int d_out, int sketch_rows, Decision d, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const ScopeLayout layout = scope_layout(workspace, d.batch * d.seq, d.batch);
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const Collect action{layout.listed, layout.count};
    const cudaError_t error = launch_scope(static_cast<const T*>(response), sketch_rows, d, layout, action, stream);
    if (error != cudaSuccess) return reason(error);
    return reason(launch_add_edits(Values{output, output_type}, static_cast<const T*>(x), static_cast<const T*>(delta), layout,
                                   d_in, d_out, stream));
  });
}

const char* add_edits(DType output_type, void* output, DType type, const void* x, const void* delta, const bool* scope,
                      int tokens, int d_in, int d_out, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const ScopeLayout layout = scope_layout(workspace, tokens, 0);
  cudaError_t error = cudaMemsetAsync(workspace, 0, layout.zeroed, stream);
  if (error != cudaSuccess) return reason(error);
  const int blocks = (tokens + kThreads - 1) / kThreads, resident = multiprocessors();
  error = launch(list_kernel, dim3(blocks < resident ? blocks : resident), dim3(kThreads), 0, stream, scope, tokens,
                 layout.listed, layout.count);
  if (error != cudaSuccess) return reason(error);
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    return reason(launch_add_edits(Values{output, output_type}, static_cast<const T*>(x), static_cast<const T*>(delta), layout,
                                   d_in, d_out, stream));
  });
}

const char* decode_hook(DType type, void* output, const void* x, const void* weight, const void* bias, const void* delta,
                        const void* sketch, int d_in, int d_out, int sketch_rows, Decision d, void* workspace,
                        void* stream) {
  const int tokens = d.batch * d.seq;
  if (tokens > kDecodeTokens) return "decode_hook takes at most 64 tokens";
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const DecodeLayout layout = decode_layout(workspace, tokens, d_out, sketch_rows, sizeof(T));
    const auto run = [&](auto launcher) {
      return reason(launcher(static_cast<T*>(output), static_cast<const T*>(x), static_cast<const T*>(weight),
                             static_cast<const T*>(bias), static_cast<const T*>(delta), static_cast<const T*>(sketch), d_in,
                             d_out, sketch_rows, d, layout, static_cast<cudaStream_t>(stream)));
    };
    if (tokens <= 8) return run(launch_decode<T, 1>);
    if (tokens <= 16) return run(launch_decode<T, 2>);
    if (tokens <= 32) return run(launch_decode<T, 4>);
    return run(launch_decode<T, 8>);
  });
}

}  // namespace comeba
