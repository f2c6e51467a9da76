//! Splitting work over torch's intra-op threads.
//!
//! A pool of our own beside torch's was measured to double the time of a small kernel that follows a
//! convolution, so kernels inside ops use torch's. It is reached through the C function that libtorch has
//! for this (torch 2.10 and later): `at::parallel_for` itself is a template that runs serially, without a
//! word, wherever it is compiled without OpenMP, and compiling with OpenMP would tie the library to
//! one OpenMP runtime, which need not be torch's.

use std::ffi::c_void;
use std::ops::Range;

/// Elements below which no second thread is worth waking; torch's own `GRAIN_SIZE`.
pub const GRAIN: usize = 32_768;

extern "C" {
    /// 0 unless a body threw.
    fn torch_parallel_for(
        begin: i64,
        end: i64,
        grain: i64,
        body: extern "C" fn(i64, i64, *mut c_void),
        context: *mut c_void,
    ) -> i32;
}

/// A pointer that threads may share because they write to different places.
#[derive(Clone, Copy)]
pub struct Shared<T>(pub *mut T);
// SAFETY: users write disjoint elements; see each use.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Calls `body` on stretches that together are `0..n`, at least `grain` long but for the last, on
/// torch's intra-op threads; in this thread alone if `n <= grain`.
pub fn for_each_range<F: Fn(Range<usize>) + Sync>(n: usize, grain: usize, body: F) {
    if n <= grain {
        if n > 0 {
            body(0..n);
        }
        return;
    }
    extern "C" fn call<F: Fn(Range<usize>) + Sync>(begin: i64, end: i64, context: *mut c_void) {
        // SAFETY: `context` is the `&F` given below, which outlives the call; `F` is `Sync`.
        let body = unsafe { &*context.cast_const().cast::<F>() };
        body(begin as usize..end as usize);
    }
    // SAFETY: `torch_parallel_for` calls `call::<F>` with this context only before it returns.
    let status = unsafe {
        torch_parallel_for(
            0,
            n as i64,
            grain as i64,
            call::<F>,
            std::ptr::from_ref(&body).cast_mut().cast(),
        )
    };
    assert_eq!(status, 0, "torch_parallel_for failed");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Mutex;

    #[test]
    fn every_element_comes_once_and_torchs_threads_are_used() {
        let before = tch::get_num_threads();
        tch::set_num_threads(2);
        let seen = Mutex::new((vec![0_u8; 100_000], HashSet::new()));
        for_each_range(100_000, 10, |range| {
            let mut seen = seen.lock().expect("no panic");
            for i in range {
                seen.0[i] += 1;
            }
            seen.1.insert(std::thread::current().id());
        });
        tch::set_num_threads(before);
        let (counts, threads) = seen.into_inner().expect("no panic");
        assert!(counts.iter().all(|&c| c == 1));
        assert_eq!(threads.len(), 2);
    }
}
