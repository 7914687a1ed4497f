// Launcher of the edits of what a text names: grid, shared memory, and the choice of types. See subject_hook.h.
#include "subject_hook.cuh"

namespace comeba {

const char* subject_hook(DType output_type, void* output, DType type, const void* x, SubjectScope scope, Subjects subjects,
                         Factors factors, int tokens, int d_in, int d_out, void* stream) {
  const size_t shared = (static_cast<size_t>(scope.rows) + factors.width) * sizeof(float);
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    return reason(launch(subject_hook_kernel<T>, dim3(tokens), dim3(kSubjectThreads), shared,
                         static_cast<cudaStream_t>(stream), Values{output, output_type}, static_cast<const T*>(x), scope,
                         subjects, factors, d_in, d_out));
  });
}

}  // namespace comeba
