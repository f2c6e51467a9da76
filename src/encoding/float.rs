//! Floating-point formats: which values they have.

use crate::error::{Error, Result};

/// A binary floating-point format with one sign bit.
///
/// Its values are `i * 2^(e - mantissa_bits)` with `e = max(floor(log2 |x|), min_exponent)` and an
/// integer `i`, up to [`max`](Self::max): below `2^min_exponent` they are evenly spaced.
///
/// Without `finite` the format has the largest value of the IEEE 754 format of these fields. The codes
/// that IEEE 754 keeps for infinity and NaN go to one more binade at the lower end, as in AIMET, except
/// in the formats that are dtypes of torch (float16, bfloat16, float8 E5M2). The finite formats follow
/// OCP (microscaling formats 1.0; float8 specification): of those with 8 or more bits the highest code
/// is NaN (E4M3: 448), the shorter ones have none (E2M1: 6, E3M2: 28, E2M3: 7.5). With `unsigned_zero`
/// the code of negative zero is NaN.
///
/// ```
/// use rimet::encoding::FloatFormat;
/// let e4m3 = FloatFormat::new(4, 3, true, false).unwrap();
/// assert_eq!((e4m3.max(), e4m3.min_exponent()), (448.0, -6));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloatFormat {
    exponent_bits: u32,
    mantissa_bits: u32,
    finite: bool,
    unsigned_zero: bool,
}

/// Fields of the formats that follow IEEE 754 in all, subnormals included.
const IEEE: [(u32, u32); 3] = [(5, 10), (8, 7), (5, 2)];

impl FloatFormat {
    /// A format of `exponent_bits` (0 to 8) and `mantissa_bits` (0 to 23), of which at least one.
    ///
    /// # Errors
    /// [`Error::Value`] for other numbers of bits, and for `unsigned_zero` without `finite`.
    pub fn new(
        exponent_bits: i64,
        mantissa_bits: i64,
        finite: bool,
        unsigned_zero: bool,
    ) -> Result<Self> {
        for (name, bits, most) in [
            ("exponent_bits", exponent_bits, 8),
            ("mantissa_bits", mantissa_bits, 23),
        ] {
            if !(0..=most).contains(&bits) {
                return Err(Error::value(name, format!("0 to {most}"), bits));
            }
        }
        if exponent_bits + mantissa_bits == 0 {
            return Err(Error::value(
                "exponent_bits, mantissa_bits",
                "at least one bit",
                "0 and 0",
            ));
        }
        if unsigned_zero && !finite {
            return Err(Error::value(
                "unsigned_zero",
                "false, or finite = true as well",
                "true with finite = false",
            ));
        }
        Ok(Self {
            exponent_bits: exponent_bits as u32,
            mantissa_bits: mantissa_bits as u32,
            finite,
            unsigned_zero,
        })
    }

    /// Explicit bits of the mantissa.
    pub fn mantissa_bits(&self) -> u32 {
        self.mantissa_bits
    }

    /// Whether there is one zero only.
    pub fn unsigned_zero(&self) -> bool {
        self.unsigned_zero
    }

    /// Number of bits, the sign's included.
    pub fn bitwidth(&self) -> u32 {
        self.exponent_bits + self.mantissa_bits + 1
    }

    /// Exponent of the largest value.
    fn max_exponent(&self) -> i32 {
        if self.exponent_bits == 0 {
            return if self.finite { 0 } else { -1 };
        }
        let half = 1_i32 << (self.exponent_bits - 1);
        match (self.finite, self.unsigned_zero) {
            (true, true) => half - 1,
            (true, false) => half,
            // The highest exponent is that of infinity; a single bit has none to spare.
            (false, _) => (2 * half - 2).max(0) - (half - 1),
        }
    }

    /// The largest value.
    pub fn max(&self) -> f64 {
        let highest_is_nan = self.finite && !self.unsigned_zero && self.bitwidth() >= 8;
        let missing = if highest_is_nan { 2.0 } else { 1.0 };
        (2.0 - missing * exp2(-(self.mantissa_bits as i32))) * exp2(self.max_exponent())
    }

    /// Exponent of the smallest normal value.
    pub fn min_exponent(&self) -> i32 {
        if !self.finite && IEEE.contains(&(self.exponent_bits, self.mantissa_bits)) {
            return 2 - (1 << (self.exponent_bits - 1));
        }
        self.max_exponent() - ((1 << self.exponent_bits) - 2)
    }

    /// Whether float32 holds all values of the format, and its normal values as normal ones; otherwise
    /// kernels compute in float64.
    pub fn fits_f32(&self) -> bool {
        const FINEST: i32 = -149;
        self.max_exponent() < f32::MAX_EXP
            && self.min_exponent() >= f32::MIN_EXP - 1
            && self.min_exponent() - self.mantissa_bits as i32 >= FINEST
    }
}

/// `2^exponent`, a normal float64 for every format.
fn exp2(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(exponent: i64, mantissa: i64, finite: bool, unsigned_zero: bool) -> FloatFormat {
        FloatFormat::new(exponent, mantissa, finite, unsigned_zero).unwrap()
    }

    #[test]
    fn formats_have_the_values_of_their_standards() {
        // (format, largest, smallest normal exponent)
        let cases = [
            (format(5, 10, false, false), 65504.0, -14),
            (format(8, 7, false, false), 3.389_531_389_251_535_5e38, -126),
            (format(5, 2, false, false), 57344.0, -14),
            (format(4, 3, true, false), 448.0, -6),
            (format(4, 3, true, true), 240.0, -7),
            (format(5, 2, true, true), 57344.0, -15),
            (format(3, 2, true, false), 28.0, -2),
            (format(2, 3, true, false), 7.5, 0),
            (format(2, 1, true, false), 6.0, 0),
        ];
        for (format, max, min_exponent) in cases {
            assert_eq!(format.max(), max, "{format:?}");
            assert_eq!(format.min_exponent(), min_exponent, "{format:?}");
            assert!(format.fits_f32());
        }
        assert!(!format(8, 23, false, false).fits_f32(), "too fine");
        assert!(!format(8, 7, true, false).fits_f32(), "too large");
        assert!(!format(8, 3, false, false).fits_f32(), "normal at 2^-127");
    }

    #[test]
    fn impossible_formats_are_refused_by_name() {
        for (exponent, mantissa, finite, unsigned_zero, word) in [
            (-1, 3, false, false, "exponent_bits"),
            (9, 3, false, false, "exponent_bits"),
            (4, 24, false, false, "mantissa_bits"),
            (0, 0, true, false, "at least one bit"),
            (4, 3, false, true, "unsigned_zero"),
        ] {
            let message = FloatFormat::new(exponent, mantissa, finite, unsigned_zero)
                .unwrap_err()
                .to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
