//! Splitting work over torch's intra-op threads.
//!
//! A pool of our own beside torch's was measured to double the time of a small kernel that follows a
//! convolution, so kernels inside ops use `at::parallel_for` (see `csrc/parallel.cpp`).

use std::ffi::c_void;
use std::ops::Range;

/// Elements below which no second thread is worth waking; torch's own `GRAIN_SIZE`.
pub const GRAIN: usize = 32_768;

extern "C" {
    fn rimet_parallel_for(
        begin: i64,
        end: i64,
        grain: i64,
        body: extern "C" fn(*const c_void, i64, i64),
        context: *const c_void,
    );
}

/// Calls `body` on stretches that together are `0..n`, at least `grain` long but for the last, on
/// torch's intra-op threads; in this thread alone if `n <= grain`.
pub fn for_each_range<F: Fn(Range<usize>) + Sync>(n: usize, grain: usize, body: F) {
    if n <= grain {
        if n > 0 {
            body(0..n);
        }
        return;
    }
    extern "C" fn call<F: Fn(Range<usize>) + Sync>(context: *const c_void, begin: i64, end: i64) {
        // SAFETY: `context` is the `&F` given below, which outlives the call; `F` is `Sync`.
        let body = unsafe { &*context.cast::<F>() };
        body(begin as usize..end as usize);
    }
    // SAFETY: `rimet_parallel_for` calls `call::<F>` with this context only before it returns.
    unsafe {
        rimet_parallel_for(
            0,
            n as i64,
            grain as i64,
            call::<F>,
            std::ptr::from_ref(&body).cast(),
        );
    }
}
