//! Which instruction set the kernels run with.

use super::vector::{Lanes, Vector};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::OnceLock;

/// An instruction set the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// The target's baseline (SSE2 on x86-64; the only one on other architectures).
    Portable = 1,
    /// AVX2 with F16C.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512 = 3,
}

impl Isa {
    /// Every instruction set, narrowest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The name used by `RIMET_ISA` and `rimet.backend_info()`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The instruction set of that name.
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }
}

static FORCED: AtomicU8 = AtomicU8::new(0);

/// The widest instruction set of this processor.
pub fn detected() -> Isa {
    static DETECTED: OnceLock<Isa> = OnceLock::new();
    *DETECTED.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    })
}

/// The instruction set in use: the detected one, unless [`force`] or the environment variable
/// `RIMET_ISA` (`portable`, `avx2`, `avx512`) asks for a narrower one.
pub fn active() -> Isa {
    match FORCED.load(Ordering::Relaxed) {
        1 => Isa::Portable,
        2 => Isa::Avx2,
        3 => Isa::Avx512,
        _ => {
            static FROM_ENVIRONMENT: OnceLock<Isa> = OnceLock::new();
            *FROM_ENVIRONMENT.get_or_init(|| {
                std::env::var("RIMET_ISA")
                    .ok()
                    .and_then(|name| Isa::from_name(&name))
                    .map_or(detected(), |wanted| wanted.min(detected()))
            })
        }
    }
}

/// Makes all later kernel calls of the process use `isa`; `None` goes back to the default. For tests.
/// Answers whether the processor has it; if it has not, nothing changes.
pub fn force(isa: Option<Isa>) -> bool {
    match isa {
        None => FORCED.store(0, Ordering::Relaxed),
        Some(isa) if isa <= detected() => FORCED.store(isa as u8, Ordering::Relaxed),
        Some(_) => return false,
    }
    true
}

/// Compile-time side of [`Isa`]: what the always-inlined bodies are generic over.
pub trait Simd: Copy + 'static {
    /// Sixteen float32.
    type F32: Vector<f32>;
    /// Sixteen float64.
    type F64: Vector<f64>;
    /// Whether rounding to even is one instruction.
    const HAS_ROUND: bool;
    /// Sixteen float16 bit patterns as float32.
    fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16];
    /// Sixteen float32 as float16 bit patterns, ties to even.
    fn f32_to_f16(values: &[f32; 16]) -> [u16; 16];
    /// Sixteen float32 as float64.
    fn f32_to_f64(values: &[f32; 16]) -> [f64; 16];
    /// Sixteen float64 as float32, ties to even.
    fn f64_to_f32(values: &[f64; 16]) -> [f32; 16];
    /// Copies `bytes` bytes past the cache; other threads see them after this one's [`Simd::fence`].
    ///
    /// # Safety
    /// `from` and `to` are valid for `bytes` bytes, a multiple of 32; `to` is aligned to 64, or to 32 if
    /// `bytes` is 32.
    unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize);
    /// Orders streamed bytes before whatever this thread writes next.
    fn fence();
}

/// Baseline code.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    type F32 = Lanes<f32>;
    type F64 = Lanes<f64>;
    const HAS_ROUND: bool = cfg!(any(target_arch = "aarch64", target_feature = "sse4.1"));
    #[inline(always)]
    fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = half::f16::from_bits(bits[i]).to_f32_const();
        }
        out
    }
    #[inline(always)]
    fn f32_to_f16(values: &[f32; 16]) -> [u16; 16] {
        let mut out = [0; 16];
        for i in 0..16 {
            out[i] = half::f16::from_f32_const(values[i]).to_bits();
        }
        out
    }
    #[inline(always)]
    fn f32_to_f64(values: &[f32; 16]) -> [f64; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f64::from(values[i]);
        }
        out
    }
    #[inline(always)]
    fn f64_to_f32(values: &[f64; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = values[i] as f32;
        }
        out
    }
    #[inline(always)]
    unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: by the contract. SSE2 belongs to x86-64.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            for i in (0..bytes).step_by(16) {
                use std::arch::x86_64::{_mm_loadu_si128, _mm_stream_si128};
                _mm_stream_si128(to.add(i).cast(), _mm_loadu_si128(from.add(i).cast()));
            }
            #[cfg(not(target_arch = "x86_64"))]
            std::ptr::copy_nonoverlapping(from, to, bytes);
        }
    }
    #[inline(always)]
    fn fence() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE belongs to x86-64.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::{F32x16Avx2, F32x16Avx512, F64x16Avx2, F64x16Avx512};
    use super::{Portable, Simd};
    use std::arch::x86_64::*;

    /// Code inside a function with AVX2 and F16C switched on.
    #[derive(Clone, Copy)]
    pub struct Avx2;
    /// Code inside a function with AVX-512 switched on.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx2 {
        type F32 = F32x16Avx2;
        type F64 = F64x16Avx2;
        const HAS_ROUND: bool = true;
        #[inline(always)]
        fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: `Avx2` is only named inside functions with `f16c` enabled (see `dispatch`); the
            // pointers stay inside the two arrays.
            unsafe {
                for half in 0..2 {
                    let b = _mm_loadu_si128(bits.as_ptr().add(8 * half).cast());
                    _mm256_storeu_ps(out.as_mut_ptr().add(8 * half), _mm256_cvtph_ps(b));
                }
            }
            out
        }
        #[inline(always)]
        fn f32_to_f16(values: &[f32; 16]) -> [u16; 16] {
            let mut out = [0; 16];
            // SAFETY: as above.
            unsafe {
                for half in 0..2 {
                    let v = _mm256_loadu_ps(values.as_ptr().add(8 * half));
                    let b = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v);
                    _mm_storeu_si128(out.as_mut_ptr().add(8 * half).cast(), b);
                }
            }
            out
        }
        #[inline(always)]
        fn f32_to_f64(values: &[f32; 16]) -> [f64; 16] {
            let mut out = [0.0; 16];
            // SAFETY: as above.
            unsafe {
                for i in (0..16).step_by(4) {
                    let v = _mm_loadu_ps(values.as_ptr().add(i));
                    _mm256_storeu_pd(out.as_mut_ptr().add(i), _mm256_cvtps_pd(v));
                }
            }
            out
        }
        #[inline(always)]
        fn f64_to_f32(values: &[f64; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: as above.
            unsafe {
                for i in (0..16).step_by(4) {
                    let v = _mm256_loadu_pd(values.as_ptr().add(i));
                    _mm_storeu_ps(out.as_mut_ptr().add(i), _mm256_cvtpd_ps(v));
                }
            }
            out
        }
        #[inline(always)]
        unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
            // SAFETY: by the contract; `Avx2` is only named where AVX2 is enabled.
            unsafe {
                for i in (0..bytes).step_by(32) {
                    _mm256_stream_si256(to.add(i).cast(), _mm256_loadu_si256(from.add(i).cast()));
                }
            }
        }
        #[inline(always)]
        fn fence() {
            Portable::fence();
        }
    }

    impl Simd for Avx512 {
        type F32 = F32x16Avx512;
        type F64 = F64x16Avx512;
        const HAS_ROUND: bool = true;
        #[inline(always)]
        fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16] {
            Avx2::f16_to_f32(bits)
        }
        #[inline(always)]
        fn f32_to_f16(values: &[f32; 16]) -> [u16; 16] {
            Avx2::f32_to_f16(values)
        }
        #[inline(always)]
        fn f32_to_f64(values: &[f32; 16]) -> [f64; 16] {
            let mut out = [0.0; 16];
            // SAFETY: `Avx512` is only named where AVX-512 is enabled; the pointers stay inside the two
            // arrays.
            unsafe {
                for i in (0..16).step_by(8) {
                    let v = _mm256_loadu_ps(values.as_ptr().add(i));
                    _mm512_storeu_pd(out.as_mut_ptr().add(i), _mm512_cvtps_pd(v));
                }
            }
            out
        }
        #[inline(always)]
        fn f64_to_f32(values: &[f64; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: as above.
            unsafe {
                for i in (0..16).step_by(8) {
                    let v = _mm512_loadu_pd(values.as_ptr().add(i));
                    _mm256_storeu_ps(out.as_mut_ptr().add(i), _mm512_cvtpd_ps(v));
                }
            }
            out
        }
        #[inline(always)]
        unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
            // SAFETY: by the contract; `Avx512` is only named where AVX-512 is enabled.
            unsafe {
                if !bytes.is_multiple_of(64) {
                    return Avx2::stream(to, from, bytes);
                }
                for i in (0..bytes).step_by(64) {
                    _mm512_stream_si512(to.add(i).cast(), _mm512_loadu_si512(from.add(i).cast()));
                }
            }
        }
        #[inline(always)]
        fn fence() {
            Portable::fence();
        }
    }
}
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// A loop body that can be compiled for any instruction set. `run` must be `#[inline(always)]`, or the
/// body is compiled for the baseline.
pub trait Body {
    /// What the body gives back.
    type Output;
    /// The body, once.
    fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `body` compiled for the active instruction set.
#[inline]
pub fn dispatch<B: Body>(body: B) -> B::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn avx2<B: Body>(body: B) -> B::Output {
            body.run::<Avx2>()
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
        unsafe fn avx512<B: Body>(body: B) -> B::Output {
            body.run::<Avx512>()
        }
        match active() {
            // SAFETY: `active` never exceeds what the processor was found to have.
            Isa::Avx512 => return unsafe { avx512(body) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2(body) },
            Isa::Portable => {}
        }
    }
    body.run::<Portable>()
}
