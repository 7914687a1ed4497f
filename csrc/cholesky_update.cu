// Launcher of the Cholesky update kernels. See cholesky_update.h.
#include "cholesky_update.h"

#include "cholesky_update.cuh"

namespace comeba {
namespace {

// The new factor grows in `target`; `x` are the keys still to be eliminated, `transform` the current panel's T.
template <typename T>
struct Layout {
  T *target, *x, *transform;
  size_t bytes;

  Layout(void* workspace, size_t batch, size_t d, size_t u) {
    target = static_cast<T*>(workspace);
    x = target + batch * d * d;
    transform = x + batch * d * (u < kKeys ? u : kKeys);
    bytes = (batch * d * d + batch * d * (u < kKeys ? u : kKeys) + batch * (kPanel + kKeys) * (kPanel + kKeys)) * sizeof(T);
  }
};

// As many keys as the shared memory of a block has room for: of float64 half of them where that is 99 KB (8.6, 8.9, 12.0).
template <typename T>
int keys_at_once() {
  int device = 0, room = 0, u = kKeys;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto fits = [&] {
    const size_t most = static_cast<size_t>(room);
    return transform_shared(kPanel, u, sizeof(T)) <= most && apply_shared(kPanel + u, sizeof(T)) <= most;
  };
  while (u > 1 && !fits()) u /= 2;
  return u;
}

template <typename T>
cudaError_t run(T* factor, const T* k, int batch, int d, int all, int sign, int* info, void* workspace,
                cudaStream_t stream) {
  const Layout<T> parts(workspace, batch, d, all);
  const T* source = factor;
  const int most = keys_at_once<T>();
  for (int first = 0; first < all; first += most) {
    const int u = all - first < most ? all - first : most;
    cudaError_t error = launch(take_keys_kernel<T>, dim3(d, batch), dim3(32), 0, stream, parts.x, k, all, first, u);
    for (int start = 0; start < d && error == cudaSuccess; start += kPanel) {
      const int width = d - start < kPanel ? d - start : kPanel, tiles = (d - start - width + kTileRows - 1) / kTileRows;
      error = launch(transform_kernel<T>, dim3(batch), dim3(kTransformThreads), transform_shared(width, u, sizeof(T)),
                     stream, source, parts.target, parts.x, parts.transform, info, d, u, start, width,
                     static_cast<T>(sign));
      if (error != cudaSuccess) break;
      error = launch(apply_kernel<T>, dim3(tiles, batch), dim3(kThreads), apply_shared(width + u, sizeof(T)), stream,
                     source, parts.target, parts.x, parts.transform, info, d, u, start, width);
    }
    if (error != cudaSuccess) return error;
    source = parts.target;
  }
  return launch(commit_kernel<T>, dim3(d, batch), dim3(kThreads), 0, stream, factor, parts.target, info, d);
}

}  // namespace

size_t cholesky_update_workspace(int batch, int d, int u, size_t item) {
  return item == sizeof(double) ? Layout<double>(nullptr, batch, d, u).bytes : Layout<float>(nullptr, batch, d, u).bytes;
}

const char* cholesky_update(bool is_double, void* factor, const void* k, int batch, int d, int u, int sign, int* info,
                            void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const cudaError_t error = is_double ? run(static_cast<double*>(factor), static_cast<const double*>(k), batch, d, u, sign,
                                            info, workspace, stream)
                                      : run(static_cast<float*>(factor), static_cast<const float*>(k), batch, d, u, sign,
                                            info, workspace, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace comeba
