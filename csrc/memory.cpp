// Where results are written.

#include "ops.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rimet {

#ifdef __linux__
// glibc's malloc maps blocks of 32 MiB and more from the system each time and gives them back when
// they are freed (mallopt(3), M_MMAP_THRESHOLD). A result of that size is paged in anew on every
// call, 4 KiB at a time, which takes several times as long as computing it. Huge pages are as many
// as a five-hundredth. Smaller blocks come from memory that malloc keeps, and are left alone.
static constexpr size_t kMapped = size_t{32} << 20;

// A hint: systems without huge pages, or with them on always, do not heed it.
static void in_huge_pages(const Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.nbytes() < kMapped) {
    return;
  }
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto first = (start + page - 1) / page * page;
  const auto last = (start + tensor.nbytes()) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
static void in_huge_pages(const Tensor&) {}
#endif

Tensor result_like(const Tensor& like) {
  Tensor result = at::empty_like(like);
  in_huge_pages(result);
  return result;
}

}  // namespace rimet
