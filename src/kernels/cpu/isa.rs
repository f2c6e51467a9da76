//! Which instruction set the kernels run with.

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
    /// Whether rounding to even is one instruction.
    const HAS_ROUND: bool;
    /// Sixteen float16 bit patterns as float32.
    fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16];
    /// Sixteen float32 as float16 bit patterns, ties to even.
    fn f32_to_f16(values: &[f32; 16]) -> [u16; 16];
}

/// Baseline code.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    const HAS_ROUND: bool = cfg!(any(target_arch = "aarch64", target_feature = "sse4.1"));
    #[inline(always)]
    fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16] {
        std::array::from_fn(|i| half::f16::from_bits(bits[i]).to_f32_const())
    }
    #[inline(always)]
    fn f32_to_f16(values: &[f32; 16]) -> [u16; 16] {
        std::array::from_fn(|i| half::f16::from_f32_const(values[i]).to_bits())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// Code inside a function with AVX2 and F16C switched on.
    #[derive(Clone, Copy)]
    pub struct Avx2;
    /// Code inside a function with AVX-512 switched on.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx2 {
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
    }

    impl Simd for Avx512 {
        const HAS_ROUND: bool = true;
        #[inline(always)]
        fn f16_to_f32(bits: &[u16; 16]) -> [f32; 16] {
            Avx2::f16_to_f32(bits)
        }
        #[inline(always)]
        fn f32_to_f16(values: &[f32; 16]) -> [u16; 16] {
            Avx2::f32_to_f16(values)
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
        // SAFETY: `active` never exceeds what the processor was found to have.
        match active() {
            Isa::Avx512 => return unsafe { avx512(body) },
            Isa::Avx2 => return unsafe { avx2(body) },
            Isa::Portable => {}
        }
    }
    body.run::<Portable>()
}
