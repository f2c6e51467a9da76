// A stand-in for libcuda.so.1 (RIMET_LIBCUDA names it) whose one device is the CPU. It takes the
// calls of src/kernels/cuda/driver.rs, checks them, and runs the kernels that are compiled into the
// same library (host.h).

#include <dlfcn.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "host.h"

HostIndex threadIdx;
HostIndex blockIdx;

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kInvalidImage = 200;
constexpr int kInvalidContext = 201;
constexpr int kNotFound = 500;

using Kernel = void (*)(const void*);

// ---- a block of threads, as coroutines that change places at barriers
// ----------------------------------

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished;
};

Thread threads[kMaxThreads];
ucontext_t scheduler;
unsigned running;
Kernel running_kernel;
const void* running_argument;

void thread_body() {
  running_kernel(running_argument);
  threads[running].finished = true;
}

// Runs one block. backwards: the last thread first, so that a missing barrier changes results.
void run_block(unsigned count, bool backwards) {
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) {
      thread.stack = std::make_unique<char[]>(kStack);
    }
    thread.finished = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, thread_body, 0);
  }
  for (;;) {
    unsigned finished = 0;
    for (unsigned i = 0; i < count; ++i) {
      running = backwards ? count - 1 - i : i;
      threadIdx.x = running;
      swapcontext(&scheduler, &threads[running].context);
      finished += threads[running].finished;
    }
    if (finished == count) {
      return;
    }
    if (finished != 0) {
      std::fprintf(stderr, "%u threads wait at a barrier that %u others never reach\n",
                   count - finished, finished);
      std::abort();
    }
  }
}

std::mutex mutex;
long launches = 0;
long loads = 0;
thread_local std::vector<void*> contexts;
int the_context;

}  // namespace

void __syncthreads() {
  const unsigned self = running;
  swapcontext(&threads[self].context, &scheduler);
}

extern "C" {

// For the tests: what was asked of the driver so far.
long host_driver_launches() { return launches; }
long host_driver_loads() { return loads; }

int cuInit(unsigned flags) { return flags == 0 ? kSuccess : kInvalidValue; }

int cuGetErrorString(int, const char** text) {
  *text = "an error of the host driver";
  return kSuccess;
}

// Any ordinal: CPU tensors have none.
int cuDeviceGet(int* device, int) {
  *device = 0;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 0 || (attribute != 75 && attribute != 76)) {
    return kInvalidValue;
  }
  *value = attribute == 75 ? 9 : 0;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &the_context;
  return device == 0 ? kSuccess : kInvalidValue;
}

int cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return kSuccess;
}

int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) {
    return kInvalidContext;
  }
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  thread_local int current = 0;
  std::swap(*mode, current);
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
  std::lock_guard<std::mutex> guard(mutex);
  if (contexts.empty()) {
    return kInvalidContext;
  }
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0) {
    return kInvalidImage;
  }
  ++loads;
  *module = &the_context;
  return kSuccess;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&cuInit), &self) == 0) {
    return kNotFound;
  }
  void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *function = library ? dlsym(library, name) : nullptr;
  return *function ? kSuccess : kNotFound;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void*, void** arguments, void** extra) {
  std::lock_guard<std::mutex> guard(mutex);
  if (contexts.empty()) {
    return kInvalidContext;
  }
  if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_x == 0 || block_x > kMaxThreads ||
      block_y != 1 || block_z != 1 || shared_bytes != 0 || extra != nullptr) {
    return kInvalidValue;
  }
  running_kernel = reinterpret_cast<Kernel>(function);
  running_argument = arguments[0];
  for (unsigned block = 0; block < grid_x; ++block) {
    blockIdx.x = block;
    run_block(block_x, launches % 2 != 0);
  }
  ++launches;
  return kSuccess;
}

// ---- NVRTC: everything is compiled already
// --------------------------------------------------------------

int nvrtcVersion(int* major, int* minor) {
  *major = 0;
  *minor = 0;
  return kSuccess;
}

int nvrtcGetNumSupportedArchs(int* count) {
  *count = 1;
  return kSuccess;
}

int nvrtcGetSupportedArchs(int* architectures) {
  architectures[0] = 90;
  return kSuccess;
}

int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*,
                       const char* const*) {
  *program = &the_context;
  return kSuccess;
}

int nvrtcCompileProgram(void*, int, const char* const*) { return kSuccess; }
int nvrtcDestroyProgram(void**) { return kSuccess; }

int nvrtcGetCUBINSize(void*, size_t* size) {
  *size = 4;
  return kSuccess;
}

int nvrtcGetCUBIN(void*, char* code) {
  std::memcpy(code,
              "\x7f"
              "ELF",
              4);
  return kSuccess;
}

int nvrtcGetPTXSize(void*, size_t*) { return kInvalidValue; }
int nvrtcGetPTX(void*, char*) { return kInvalidValue; }
int nvrtcGetProgramLogSize(void*, size_t*) { return kInvalidValue; }
int nvrtcGetProgramLog(void*, char*) { return kInvalidValue; }
const char* nvrtcGetErrorString(int) { return "an error of the host driver"; }

}  // extern "C"
