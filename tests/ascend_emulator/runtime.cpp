// libascendcl.so: the runtime of CANN as far as torch_npu uses it. Devices are a share of the host's memory, a stream
// is a thread that does one thing after the other, an event is a mark that the stream reaches.
#include <fcntl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <mutex>
#include <thread>

#include "emulator.h"

using namespace emulator;
using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

namespace {

// A point in a stream's work: reached once, then for good.
class Mark {
 public:
  void reach() {
    Lock lock(mutex);
    at = Clock::now();
    reached = true;
    changed.notify_all();
  }
  bool wait(int32_t timeout_ms = -1) {  // false: not reached in that time
    Lock lock(mutex);
    auto is_reached = [this] { return reached; };
    if (timeout_ms >= 0) return changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_reached);
    changed.wait(lock, is_reached);
    return true;
  }
  bool is_reached() { return wait(0); }
  Clock::time_point time() { return at; }

 private:
  std::mutex mutex;
  std::condition_variable changed;
  bool reached = false;
  Clock::time_point at;
};

// What a stream does. A kernel is left out once the device has failed; marks are still reached, or nobody would wake.
struct Task {
  Work work;
  bool kernel;
};

// A graph: what was enqueued while it was captured, to be done again at each replay.
struct Graph {
  std::vector<Task> tasks;
  aclmdlRICaptureMode mode;
  std::thread::id thread;
  bool capturing = true, valid = true;
};

struct Device {
  std::mutex mutex;
  int64_t used = 0;        // bytes
  bool active = false;     // has been set by this process
  aclError error = ACL_SUCCESS;
  std::string message;     // of the kernel that failed first: the device stays failed
  struct Stream* default_stream = nullptr;
  std::vector<struct Stream*> streams;

  void failed(aclError code, const std::string& what) {
    Lock lock(mutex);
    if (error) return;
    error = code;
    message = what;
  }
  aclError state() {  // also hands the message over to the caller's thread
    Lock lock(mutex);
    return error ? fail(error, message) : ACL_SUCCESS;
  }
};

Device& device(int64_t index) {
  static auto& all = immortal<std::array<Device, 64>>();
  return all.at(index);
}

void run(Device& on, const Task& task) {
  if (task.kernel && on.error) return;
  try {
    task.work();
  } catch (const KernelError& e) {
    on.failed(e.code, e.what());
  } catch (const std::exception& e) {  // libtorch refused: the emulator and torch_npu disagree about an operator
    std::cerr << "ascend_emulator: " << e.what() << std::endl;
    on.failed(ACL_ERROR_RT_AICORE_EXCEPTION, e.what());
  }
}

struct Stream {
  const int device_index;
  std::shared_ptr<Graph> capture;  // of this stream, while it lasts

  explicit Stream(int index) : device_index(index) {}

  bool is_idle() const { return pending == 0; }

  void push(Task task) {
    Lock lock(mutex);
    ++pending;
    if (!started) {
      started = true;
      std::thread([this] { work(); }).detach();
    }
    tasks.push_back(std::move(task));
    wake.notify_one();
  }

 private:
  [[noreturn]] void work() {
    prctl(PR_SET_TIMERSLACK, 1);  // sleeps end on time
    for (;;) {
      Lock lock(mutex);
      wake.wait(lock, [this] { return !tasks.empty(); });
      Task task = std::move(tasks.front());
      tasks.pop_front();
      lock.unlock();
      run(device(device_index), task);
      --pending;
    }
  }

  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Task> tasks;
  std::atomic<int64_t> pending = 0;
  bool started = false;
};

struct Event {
  std::shared_ptr<Mark> mark;      // where it was last recorded
  std::shared_ptr<Graph> capture;  // or in which capture
};

thread_local int current_device = -1;  // none has been set: then it is the first
int here() { return std::max(current_device, 0); }

thread_local std::string recent_message;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

std::mutex graphs_mutex;
auto& graphs = immortal<std::map<aclmdlRI, std::shared_ptr<Graph>>>();

Stream* stream_of(aclrtStream handle) {
  if (handle) return static_cast<Stream*>(handle);
  Device& on = device(here());
  Lock lock(on.mutex);
  if (!on.default_stream) on.streams.push_back(on.default_stream = new Stream(here()));
  return on.default_stream;
}

void push(Stream* stream, Task task) {
  if (stream->capture) stream->capture->tasks.push_back(std::move(task));
  else stream->push(std::move(task));
}

std::shared_ptr<Mark> push_mark(Stream* stream) {
  auto mark = std::make_shared<Mark>();
  stream->push({[mark] { mark->reach(); }, false});
  return mark;
}

// What waits or copies at once cannot become part of a graph, and doing it while one is captured spoils the capture.
aclError refuse_in_capture(const char* call) {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  Lock lock(graphs_mutex);
  for (auto& [handle, graph] : graphs) {
    if (!graph->capturing || graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) continue;
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL && graph->thread != std::this_thread::get_id()) continue;
    graph->valid = false;
    return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, std::string(call) + " is forbidden while a stream is captured");
  }
  return ACL_SUCCESS;
}

aclError wait(const char* call, int device_index, const std::vector<std::shared_ptr<Mark>>& marks, int32_t timeout_ms) {
  for (auto& mark : marks)
    if (!mark->wait(timeout_ms)) return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, std::string(call) + " timed out");
  if (aclError code = knobs().synchronize_error.on(device_index))
    return fail(code, std::string(call) + " failed, as ASCEND_EMULATOR_SYNCHRONIZE_ERROR asks");
  return device(device_index).state();
}

aclError synchronize_stream(aclrtStream handle, int32_t timeout_ms) {
  Stream* stream = stream_of(handle);
  if (aclError error = refuse_in_capture("aclrtSynchronizeStream")) return error;
  return wait("aclrtSynchronizeStream", stream->device_index, {push_mark(stream)}, timeout_ms);
}

aclError synchronize_device(int32_t timeout_ms) {
  if (aclError error = refuse_in_capture("aclrtSynchronizeDevice")) return error;
  int index = here();
  std::vector<std::shared_ptr<Mark>> marks;
  Lock lock(device(index).mutex);
  for (Stream* stream : device(index).streams) marks.push_back(push_mark(stream));
  lock.unlock();
  return wait("aclrtSynchronizeDevice", index, marks, timeout_ms);
}

// ---- memory --------------------------------------------------------------------------------------------------------

struct Block {
  int device_index;  // -1: host memory that was locked in place
  size_t size;
};
std::mutex blocks_mutex;
auto& blocks = immortal<std::map<void*, Block>>();

aclError allocate(void** pointer, size_t size, int device_index) {
  if (!pointer || !size) return fail(ACL_ERROR_RT_PARAM_INVALID, "no pointer, or a size of 0");
  if (device_index >= 0) {
    Device& on = device(device_index);
    Lock lock(on.mutex);
    if (on.used + int64_t(size) > knobs().memory)
      return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                  "EL0004: Failed to allocate memory: " + std::to_string(size) + " bytes, " +
                      std::to_string(knobs().memory - on.used) + " are free on device " + std::to_string(device_index));
    on.used += size;
  }
  *pointer = std::aligned_alloc(512, (size + 511) / 512 * 512);
  if (!*pointer) throw std::bad_alloc();  // of the host, which is no device that is full
  Lock lock(blocks_mutex);
  blocks[*pointer] = {device_index, size};
  return ACL_SUCCESS;
}

aclError release(void* pointer) {
  Lock lock(blocks_mutex);
  auto block = blocks.find(pointer);
  if (block == blocks.end()) return fail(ACL_ERROR_RT_PARAM_INVALID, "not a block that was allocated");
  if (block->second.device_index >= 0) {
    Device& on = device(block->second.device_index);
    Lock device_lock(on.mutex);
    on.used -= block->second.size;
  }
  blocks.erase(block);
  std::free(pointer);
  return ACL_SUCCESS;
}

bool is_known(const void* pointer) {  // allocated here, on a device or as locked host memory
  Lock lock(blocks_mutex);
  auto after = blocks.upper_bound(const_cast<void*>(pointer));
  if (after == blocks.begin()) return false;
  auto& [start, block] = *std::prev(after);
  return static_cast<const char*>(pointer) < static_cast<char*>(start) + block.size;
}

// ---- ASCEND_EMULATOR_TRACE -----------------------------------------------------------------------------------------

std::mutex trace_mutex;
auto& trace = immortal<std::map<std::string, int64_t>>();

__attribute__((destructor)) void write_trace() {
  if (knobs().trace.empty()) return;
  std::string lines;
  Lock lock(trace_mutex);
  for (auto& [op, calls] : trace) lines += op + " " + std::to_string(calls) + "\n";
  int file = open(knobs().trace.c_str(), O_WRONLY | O_APPEND | O_CREAT, 0666);  // one write: processes do not mix
  if (file < 0 || write(file, lines.data(), lines.size()) != ssize_t(lines.size()))
    std::cerr << "ascend_emulator: cannot write " << knobs().trace << std::endl;
  if (file >= 0) close(file);
}

}  // namespace

namespace emulator {

aclError fail(aclError code, const std::string& message) {
  recent_message = "EZ9999: Inner Error!\nEZ9999: [PID: " + std::to_string(getpid()) + "] " + message +
                   "\n        TraceBack (most recent call last):\n        ascend_emulator, runtime result = " +
                   std::to_string(code) + "\n";
  return code;
}

aclError enqueue(aclrtStream stream, Work work) {
  push(stream_of(stream), {std::move(work), true});
  return ACL_SUCCESS;
}

int device_of(aclrtStream stream) { return stream_of(stream)->device_index; }

void count_kernel(const std::string& op) {
  if (knobs().trace.empty()) return;
  Lock lock(trace_mutex);
  ++trace[op];
}

}  // namespace emulator

extern "C" {

// ---- starting, and what the device is ------------------------------------------------------------------------------

aclError aclInit(const char*) {
  aclError code = knobs().init_error.on(-1);
  return code ? fail(code, "aclInit failed, as ASCEND_EMULATOR_INIT_ERROR asks") : ACL_SUCCESS;
}

aclError aclFinalize() { return ACL_SUCCESS; }

const char* aclGetRecentErrMsg() {  // each message is given once
  static thread_local std::string given;
  given.swap(recent_message);
  recent_message.clear();
  return given.c_str();
}

const char* aclrtGetSocName() { return knobs().soc == "none" ? nullptr : knobs().soc.c_str(); }

// These versions are how a log shows that its device is emulated; build.py has CANN's, too.
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion* version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, name == ACL_PKG_NAME_DRIVER ? "25.5.0-emulated" : "8.5.0-emulated");
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  *value = attribute == ACL_CANN_ATTR_INF_NAN || attribute == ACL_CANN_ATTR_BF16;
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  static const std::map<std::string, int64_t> cores = {
      {"Ascend910B1", 24}, {"Ascend910B2", 24}, {"Ascend910B3", 20}, {"Ascend910B4", 20}, {"Ascend310P3", 8}};
  auto known = cores.find(knobs().soc);
  int64_t cube = known == cores.end() ? 20 : known->second;
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM ? cube : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 2 * cube : 96 << 20;
  return ACL_SUCCESS;
}

// The id of the device on the host, whatever ASCEND_RT_VISIBLE_DEVICES makes of it.
aclError aclrtDeviceGetUuid(int32_t index, aclrtUuid* uuid) {
  const char* visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  memset(uuid->bytes, 0xEE, sizeof uuid->bytes);
  uuid->bytes[15] = index;
  for (; visible && index >= 0; --index) {
    uuid->bytes[15] = atoi(visible);
    visible = strchr(visible, ',') ? strchr(visible, ',') + 1 : visible;
  }
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = knobs().devices;
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t index) {
  if (index < 0 || index >= knobs().devices)
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device " + std::to_string(index));
  if (aclError code = knobs().set_device_error.on(index))
    return fail(code, "aclrtSetDevice failed, as ASCEND_EMULATOR_SET_DEVICE_ERROR asks");
  device(index).active = true;
  current_device = index;
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* index) {
  if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
  *index = current_device;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetPrimaryCtxState(int32_t index, uint32_t*, int32_t* active) {
  *active = device(index).active;
  return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = current_device < 0 ? nullptr : &device(current_device);
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  if (!context) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no context");
  current_device = static_cast<Device*>(context) - &device(0);
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}

// Whether kernels must be deterministic, which these always are.
static std::array<std::atomic<int64_t>, 3> options;
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  options.at(option) = value;
  return ACL_SUCCESS;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  *value = options.at(option);
  return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t* value) { return aclrtGetSysParamOpt(option, value); }

// "disable" is the switch of jit_compile: without it every operator would take the old road (aclopCompileAndExecute).
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t size) {
  strncpy(value, "disable", size);
  return ACL_SUCCESS;
}

// ---- memory --------------------------------------------------------------------------------------------------------

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size, here()); }
aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(pointer, size, policy);
}
aclError aclrtMallocHost(void** pointer, size_t size) { return allocate(pointer, size, -1); }
aclError aclrtFree(void* pointer) { return release(pointer); }
aclError aclrtFreeHost(void* pointer) { return release(pointer); }

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  Device& on = device(here());
  Lock lock(on.mutex);
  *total = knobs().memory;
  *free = knobs().memory - on.used;
  return ACL_SUCCESS;
}

aclError aclrtMemcpy(void* to, size_t, const void* from, size_t size, aclrtMemcpyKind) {
  if (aclError error = refuse_in_capture("aclrtMemcpy")) return error;
  memcpy(to, from, size);
  return device(here()).state();
}

aclError aclrtMemcpyAsync(void* to, size_t, const void* from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
  if (kind != ACL_MEMCPY_HOST_TO_DEVICE || is_known(from)) return enqueue(stream, [=] { memcpy(to, from, size); });
  auto copy = std::make_shared<std::string>(static_cast<const char*>(from), size);  // the caller may reuse such memory
  return enqueue(stream, [=] { memcpy(to, copy->data(), size); });
}

aclError aclrtMemset(void* to, size_t, int32_t value, size_t size) {
  if (aclError error = refuse_in_capture("aclrtMemset")) return error;
  memset(to, value, size);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* to, size_t, int32_t value, size_t size, aclrtStream stream) {
  return enqueue(stream, [=] { memset(to, value, size); });
}

// ---- streams and events --------------------------------------------------------------------------------------------

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  int index = here();
  Lock lock(device(index).mutex);
  device(index).streams.push_back(new Stream(index));
  *stream = device(index).streams.back();
  return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

aclError aclrtDestroyStream(aclrtStream handle) {  // its thread may be in a kernel that never ends: it is left alone
  Device& on = device(device_of(handle));
  Lock lock(on.mutex);
  on.streams.erase(std::remove(on.streams.begin(), on.streams.end(), handle), on.streams.end());
  return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  *status = stream_of(stream)->is_idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = int32_t(reinterpret_cast<uintptr_t>(stream) >> 4);
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronize_stream(stream, -1); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t ms) { return synchronize_stream(stream, ms); }
aclError aclrtSynchronizeDevice() { return synchronize_device(-1); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return synchronize_device(ms); }

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event;
  return ACL_SUCCESS;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  Stream* stream = stream_of(stream_handle);
  auto event = static_cast<Event*>(handle);
  event->capture = stream->capture;
  event->mark = stream->capture ? nullptr : push_mark(stream);
  return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }  // recording again starts afresh

aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent event_handle) {
  Stream* stream = stream_of(handle);
  auto event = static_cast<Event*>(event_handle);
  if (event->capture) {  // the stream's work becomes part of the graph; one list in the order of the calls serves all
    if (event->capture->capturing) stream->capture = event->capture;
  } else if (auto mark = event->mark) {
    if (stream->capture && !mark->is_reached())
      return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for work outside the capture");
    if (!stream->capture) stream->push({[mark] { mark->wait(); }, false});
  }
  return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  auto mark = static_cast<Event*>(handle)->mark;
  *status = !mark || mark->is_reached() ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  if (aclError error = refuse_in_capture("aclrtSynchronizeEvent")) return error;
  auto mark = static_cast<Event*>(handle)->mark;
  std::vector<std::shared_ptr<Mark>> marks;
  if (mark) marks.push_back(mark);
  return wait("aclrtSynchronizeEvent", here(), marks, -1);
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  auto from = static_cast<Event*>(start)->mark, to = static_cast<Event*>(end)->mark;
  if (!from || !to || !from->is_reached() || !to->is_reached())
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "an event was not recorded, or is not reached");
  *ms = std::chrono::duration<float, std::milli>(to->time() - from->time()).count();
  return ACL_SUCCESS;
}

// ---- graphs --------------------------------------------------------------------------------------------------------

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (stream->capture) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already");
  stream->capture = std::make_shared<Graph>();
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  Lock lock(graphs_mutex);
  graphs[stream->capture.get()] = stream->capture;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
  auto& capture = stream_of(handle)->capture;
  *status = !capture ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : capture->valid ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
  if (graph) *graph = capture.get();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* graph) {
  Stream* stream = stream_of(handle);
  auto capture = stream->capture;
  *graph = capture.get();
  if (!capture) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
  capture->capturing = false;
  Lock lock(device(stream->device_index).mutex);
  for (Stream* joined : device(stream->device_index).streams)
    if (joined->capture == capture) joined->capture = nullptr;
  if (!capture->valid) return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "a forbidden call spoilt the capture");
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream_handle) {
  Lock lock(graphs_mutex);
  auto graph = graphs.at(handle);
  lock.unlock();
  Stream* stream = stream_of(stream_handle);
  if (stream->capture) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a graph cannot be replayed into a capture");
  return enqueue(stream, [graph, index = stream->device_index] {
    for (auto& task : graph->tasks) run(device(index), task);
  });
}

aclError aclmdlRIDestroy(aclmdlRI graph) {
  Lock lock(graphs_mutex);
  graphs.erase(graph);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, void (*function)(void*), void* argument) {
  return enqueue(stream, [=] { function(argument); });
}

// ---- the old road of operators: described as before, refused when executed -----------------------------------------

aclError aclopCompileAndExecute(const char* op, int, const aclTensorDesc* const*, const aclDataBuffer* const*, int,
                                const aclTensorDesc* const*, aclDataBuffer* const*, const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return fail(ACL_ERROR_OP_NOT_FOUND, "ascend_emulator has no operator " + std::string(op));
}

aclError aclopCompileAndExecuteV2(const char* op, int, aclTensorDesc**, aclDataBuffer**, int, aclTensorDesc**,
                                  aclDataBuffer**, aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                  aclrtStream) {
  return fail(ACL_ERROR_OP_NOT_FOUND, "ascend_emulator has no operator " + std::string(op));
}

static char nothing;  // what is described; nobody looks at it
aclTensorDesc* aclCreateTensorDesc(aclDataType, int, const int64_t*, aclFormat) {
  return reinterpret_cast<aclTensorDesc*>(&nothing);
}
aclopAttr* aclopCreateAttr() { return reinterpret_cast<aclopAttr*>(&nothing); }
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return reinterpret_cast<aclDataBuffer*>(&nothing); }

}  // extern "C"

// ---- functions that need do nothing, and functions that nobody should need -----------------------------------------
// Functions without arguments stand for them, which the calling convention allows. For the first `decltype` makes the
// compiler check that CANN's headers know the name; the others are told by the symbol's name alone, because not every
// CANN declares each of them.
#pragma GCC diagnostic ignored "-Wattribute-alias"

extern "C" int ascend_emulator_accept() { return 0; }
#define ACCEPTED(function) extern "C" decltype(function) function __attribute__((alias("ascend_emulator_accept")));
#define REFUSED(function)                                                                      \
  int refuse_##function() asm(#function);                                                      \
  int refuse_##function() {                                                                    \
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "ascend_emulator does not know " #function); \
  }

ACCEPTED(aclAppLog)
ACCEPTED(aclSetCompileopt)
ACCEPTED(aclrtSetDeviceSatMode)
ACCEPTED(aclrtSetOpExecuteTimeOut)
ACCEPTED(aclrtSetOpWaitTimeout)
ACCEPTED(aclrtSetStreamFailureMode)
ACCEPTED(aclrtSetStreamOverflowSwitch)
ACCEPTED(aclrtSetStreamAttribute)
ACCEPTED(aclrtDeviceEnablePeerAccess)
ACCEPTED(aclDestroyDataBuffer)
ACCEPTED(aclDestroyTensorDesc)
ACCEPTED(aclopDestroyAttr)
ACCEPTED(aclGetTensorDescFormat)
ACCEPTED(aclGetTensorDescNumDims)
ACCEPTED(aclGetTensorDescType)
ACCEPTED(aclSetTensorDescName)
ACCEPTED(aclSetTensorFormat)
ACCEPTED(aclSetTensorPlaceMent)
ACCEPTED(aclSetTensorShape)
ACCEPTED(aclopSetAttrBool)
ACCEPTED(aclopSetAttrDataType)
ACCEPTED(aclopSetAttrFloat)
ACCEPTED(aclopSetAttrInt)
ACCEPTED(aclopSetAttrListBool)
ACCEPTED(aclopSetAttrListFloat)
ACCEPTED(aclopSetAttrListInt)
ACCEPTED(aclopSetAttrListListInt)
ACCEPTED(aclopSetAttrString)

REFUSED(aclGetTensorDescDimV2)
REFUSED(aclmdlInitDump)
REFUSED(aclmdlSetDump)
REFUSED(aclmdlFinalizeDump)
REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtGetFunctionAddr)
REFUSED(aclrtDeviceGetBareTgid)
REFUSED(aclrtMallocPhysical)
REFUSED(aclrtFreePhysical)
REFUSED(aclrtMapMem)
REFUSED(aclrtUnmapMem)
REFUSED(aclrtReserveMemAddress)
REFUSED(aclrtReleaseMemAddress)
REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle)
REFUSED(aclrtProcessReport)

// Of HCCL, to which torch_npu 2.9.0 is linked.
REFUSED(HcclAllGather)
REFUSED(HcclAllReduce)
REFUSED(HcclBroadcast)
REFUSED(HcclCommDestroy)
REFUSED(HcclCommInitAll)
REFUSED(HcclCommInitRootInfo)
REFUSED(HcclGetRootInfo)
REFUSED(HcclRecv)
REFUSED(HcclReduceScatter)
REFUSED(HcclSend)

// Not in CANN's public headers: the profiler's, and those of compiled kernels.
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)
REFUSED(MsprofReportApi)
REFUSED(MsprofReportCompactInfo)
REFUSED(MsprofReportAdditionalInfo)
REFUSED(MsprofGetHashId)
REFUSED(MsprofSysCycleTime)
extern "C" int MsprofRegisterCallback() { return 0; }  // called when torch_npu is loaded
