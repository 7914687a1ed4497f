// Launcher of the Cholesky update, on raw device pointers. The operator's meaning is defined by
// comeba_ext/ops/cholesky_update.py.
#pragma once
#include <cstddef>

namespace comeba {

// Bytes of workspace, uninitialised; item is the size of a number.
size_t cholesky_update_workspace(int batch, int d, int u, size_t item);

// factor (batch, d, d) becomes the Cholesky factor of L Lᵀ + sign · k kᵀ, k (batch, d, u), and info (batch) tells where it
// could not; such a member keeps its factor. All dense; double or float. info must be zero before. Returns nullptr, or the
// reason why not everything was launched.
const char* cholesky_update(bool is_double, void* factor, const void* k, int batch, int d, int u, int sign, int* info,
                            void* workspace, void* stream);

}  // namespace comeba
