// C++ tests of the kernels without torch: the same program runs them on a GPU or, emulated, on the host.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../device.cuh"
#include "../hooked_linear.h"

extern "C" int row_sums(const void* in, float* out, int rows, int columns, int type);  // emulation.cu
extern "C" int shuffles(const float* in, float* out);
extern "C" int mma_tf32(const float* a, const float* b, float* c);
extern "C" int grid_barrier(unsigned* arrived, float* out, int blocks);
extern "C" int resident_blocks();

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  std::printf("%s %s\n", holds ? "ok  " : "FAIL", what);
  failures += holds ? 0 : 1;
}

// Device memory with a copy on the host.
template <typename T>
struct Array {
  std::vector<T> host;
  T* device = nullptr;
  explicit Array(std::vector<T> values) : host(std::move(values)) {
    if (cudaMalloc(&device, host.size() * sizeof(T)) != cudaSuccess) std::abort();
    cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device); }
  const std::vector<T>& read() {
    cudaDeviceSynchronize();
    cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost);
    return host;
  }
};

std::vector<float> numbers(std::size_t count) {  // reproducible, in (-1, 1), exact in tf32
  std::vector<float> values(count);
  unsigned state = 12345;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int>(state >> 22) - 512) / 512.0f;
  }
  return values;
}

const float kNan = std::numeric_limits<float>::quiet_NaN();

void test_row_sums() {
  const int rows = 5, columns = 1000;
  Array<float> in(numbers(std::size_t{rows} * columns)), out(std::vector<float>(rows, kNan));
  bool same = row_sums(in.device, out.device, rows, columns, 0) == cudaSuccess;
  out.read();
  for (int row = 0; row < rows; ++row) {
    double sum = 0;
    for (int n = 0; n < columns; ++n) sum += in.host[row * columns + n];
    same &= std::abs(sum - out.host[row]) < 1e-3;
  }
  check(same, "sums through shared memory");
}

void test_shuffles() {
  Array<float> in(numbers(32)), out(std::vector<float>(160, kNan));
  bool same = shuffles(in.device, out.device) == cudaSuccess;
  out.read();
  for (unsigned lane = 0; lane < 32; ++lane) {
    same &= out.host[lane] == in.host[7] && out.host[32 + lane] == in.host[lane ^ 5];
    same &= out.host[64 + lane] == in.host[lane % 16 + 3 < 16 ? lane + 3 : lane];
    same &= out.host[96 + lane] == in.host[lane >= 2 ? lane - 2 : lane];
    same &= out.host[128 + lane] == in.host[lane ^ (lane < 16 ? 1u : 8u)];
  }
  check(same, "shuffles");
}

void test_matrix_multiply() {
  Array<float> a(numbers(16 * 8)), b(numbers(8 * 8)), c(std::vector<float>(16 * 8, kNan));
  bool same = mma_tf32(a.device, b.device, c.device) == cudaSuccess;
  c.read();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a.host[row * 8 + k] * b.host[column * 8 + k];
      same &= std::abs(sum - c.host[row * 8 + column]) < 1e-5f;
    }
  }
  check(same, "tensor cores");
}

void test_grid_barrier() {
  const int blocks = resident_blocks() < 64 ? resident_blocks() : 64;
  Array<unsigned> arrived(std::vector<unsigned>(1, 0));
  Array<float> out(std::vector<float>(std::size_t(blocks) * 64, kNan));
  bool same = grid_barrier(arrived.device, out.device, blocks) == cudaSuccess;
  out.read();
  for (int n = 0; n < blocks * 64; ++n) same &= out.host[n] == static_cast<float>(n / 64);
  check(same, "blocks that wait for each other");
}

// A token whose edit is large is in scope, its neighbours are not.
void test_exact_hook() {
  const int tokens = 6, width = 37;
  std::vector<float> edits = numbers(std::size_t{tokens} * width);
  for (int n = 0; n < width; ++n) edits[2 * width + n] *= 10.0f;
  Array<float> output(numbers(std::size_t{tokens} * width)), edit(edits);
  Array<double> alpha({200.0}), scale({1.0});
  const std::vector<float> before = output.host;
  comeba::Decision decision{};
  decision.alpha = alpha.device;
  decision.reference_scale = scale.device;
  decision.batch = 1;
  decision.seq = tokens;
  Array<unsigned char> workspace(std::vector<unsigned char>(comeba::exact_hook_workspace(tokens, 1), 0xff));
  const char* error = comeba::exact_hook(comeba::DType::f32, output.device, comeba::DType::f32, edit.device, width,
                                         decision, workspace.device, nullptr);
  output.read();
  bool same = error == nullptr;
  for (int n = 0; n < tokens * width; ++n) same &= output.host[n] == (n / width == 2 ? before[n] + edits[n] : before[n]);
  check(same, "exact hook");
}

}  // namespace

int main() {
  test_row_sums();
  test_shuffles();
  test_matrix_multiply();
  test_grid_barrier();
  test_exact_hook();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
