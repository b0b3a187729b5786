// An Ascend NPU that is not there. torch_npu, PyTorch's backend for it, is an ordinary package; what lies beneath it,
// CANN, is a handful of shared libraries with a C interface. These three sources are those libraries, so that the real
// torch_npu runs on any machine, and a test can make the device slow, small, wrong or broken.
//
//   torch_npu:  x + y  ->  aclnnAddGetWorkspaceSize(x, y, ..., &executor), then aclnnAdd(..., executor, stream)
//   here:       operators.cpp keeps the arguments, runtime.cpp puts a task into the stream's queue, and the stream's
//               thread runs it: at::add_out over the same memory, which is the host's
//
// runtime.cpp    libascendcl.so: devices, memory, streams, events, graphs, errors. A stream is a thread, so kernels
//                really are asynchronous. A graph is the list of the tasks enqueued while it was captured.
// operators.cpp  libopapi.so: the kernels, by libtorch's CPU operators; an operator is about one line.
// knobs.cpp      the settings, from the environment. README.md has them in a table.
//
// What torch_npu wants and is not here fails by its name: the dynamic loader misses a function, or torch_npu ends up in
// aclopCompileAndExecute with an operator that libopapi.so lacks, and gets an error. Functions that return success
// without doing anything are the trap of such an emulation; those that may are listed at the end of runtime.cpp.
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

namespace emulator {

// A static object that is never destroyed, because worker threads outlive main().
template <class T, class... Arguments> T& immortal(Arguments&&... arguments) {
  return *new T(std::forward<Arguments>(arguments)...);
}

// ---- knobs.cpp ------------------------------------------------------------------------------------------------------

// When something set by a knob happens: on which of the calls that it counts, on one device or on any.
struct Trigger {
  int64_t from = 1, every = 1, device = -1;
  bool once = false, hf32 = false;  // hf32: only where the call rounded its operands to HF32
  std::shared_ptr<std::atomic<int64_t>> calls = std::make_shared<std::atomic<int64_t>>(0);
  bool count_and_strike(int64_t on_device) const {
    if (device >= 0 && device != on_device) return false;
    int64_t call = ++*calls;
    return call == from || (!once && call > from && (call - from) % every == 0);
  }
};

struct Code {  // an error code that a call is to return
  aclError code = ACL_SUCCESS;
  Trigger when;
  aclError on(int64_t device) const { return code && when.count_and_strike(device) ? code : ACL_SUCCESS; }
};

struct Fault {
  enum Kind { nan, inf, scale, offset, element, error, async_error, hang };
  std::string op;  // "Addmm", or "*"
  Kind kind;
  double value = 0;
  Trigger when;
};

struct KernelTime {
  std::string op;  // "Addmm", "half:Addmm" or "*"
  double ms, ms_per_row;
  int64_t device;  // -1: any
};

struct Knobs {
  int64_t devices = 1, memory = int64_t(32) << 30;
  std::string soc = "Ascend910B4", trace, gelu = "tanh", hf32_rounding = "nearest", hf32_only;
  bool hf32 = true, hf32_matmul = false;
  int hf32_bits = 11;
  int64_t hf32_from = 0;
  double perturb = 0;
  std::vector<Fault> faults;
  std::vector<KernelTime> kernel_times;
  Code synchronize_error, init_error, set_device_error;
};

const Knobs& knobs();                            // a malformed knob ends the process
[[noreturn]] void refuse_knob(const std::string& knob, const std::string& reason);

// ---- runtime.cpp ----------------------------------------------------------------------------------------------------

struct KernelError : std::runtime_error {        // thrown by a kernel: the device reports this code from then on
  aclError code;
  KernelError(aclError code, const std::string& what) : std::runtime_error(what), code(code) {}
};

using Work = std::function<void()>;
aclError enqueue(aclrtStream, Work);             // behind all that the stream has to do, or into the graph it captures
int device_of(aclrtStream);
aclError fail(aclError code, const std::string& message);  // keeps the message for aclGetRecentErrMsg, returns the code
void count_kernel(const std::string& op);        // for ASCEND_EMULATOR_TRACE

}  // namespace emulator
