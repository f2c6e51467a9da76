#include <ATen/Parallel.h>

#include "engine.h"

extern "C" void rimet_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                   void (*body)(const void*, int64_t, int64_t),
                                   const void* context) {
  at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(context, from, to); });
}
