//! The integer grid of an affine quantizer.

use crate::error::{Error, Result};

/// An affine grid: the integers `qmin..=qmax`, and where zero lies between them.
///
/// `x_int = clamp(round(x / scale - shift) - offset, qmin, qmax)`,
/// `x_dq = (x_int + offset + shift) * scale`, ties to even. `offset` is AIMET's: minus the
/// `zero_point` of torch and ONNX.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AffineGrid {
    qmin: i64,
    qmax: i64,
    zero_point_shift: f64,
}

impl AffineGrid {
    /// A grid of the integers `qmin..=qmax`; `zero_point_shift` is 0 or 0.5.
    ///
    /// # Errors
    /// [`Error::Value`] if `qmin >= qmax`, if the grid has more than 2^32 points, or for another shift.
    pub fn new(qmin: i64, qmax: i64, zero_point_shift: f64) -> Result<Self> {
        if qmin >= qmax {
            return Err(Error::value(
                "qmin, qmax",
                "qmin < qmax",
                format!("qmin = {qmin}, qmax = {qmax}"),
            ));
        }
        let limit = 1_i64 << 32;
        if qmin < -limit || qmax > limit || qmax - qmin >= limit {
            return Err(Error::value(
                "qmin, qmax",
                "a grid of at most 32 bits",
                format!("qmin = {qmin}, qmax = {qmax}"),
            ));
        }
        if zero_point_shift != 0.0 && zero_point_shift != 0.5 {
            return Err(Error::value(
                "zero_point_shift",
                "0 or 0.5",
                zero_point_shift,
            ));
        }
        Ok(Self {
            qmin,
            qmax,
            zero_point_shift,
        })
    }

    /// The grid of `bitwidth` bits: `0..=2^b-1`, or `-2^(b-1)..=2^(b-1)-1` if `signed`.
    ///
    /// # Errors
    /// [`Error::Value`] for a bit-width outside 1..=32.
    pub fn from_bitwidth(bitwidth: u32, signed: bool) -> Result<Self> {
        if !(1..=32).contains(&bitwidth) {
            return Err(Error::value("bitwidth", "an integer in 1..=32", bitwidth));
        }
        let steps = 1_i64 << bitwidth;
        if signed {
            Self::new(-steps / 2, steps / 2 - 1, 0.0)
        } else {
            Self::new(0, steps - 1, 0.0)
        }
    }

    /// Smallest integer of the grid.
    pub fn qmin(&self) -> i64 {
        self.qmin
    }

    /// Largest integer of the grid.
    pub fn qmax(&self) -> i64 {
        self.qmax
    }

    /// Number of steps, `qmax - qmin`.
    pub fn num_steps(&self) -> i64 {
        self.qmax - self.qmin
    }

    /// Shift of the zero point in units of scale (0 or 0.5).
    pub fn zero_point_shift(&self) -> f64 {
        self.zero_point_shift
    }

    /// The offset of a symmetric quantizer on this grid: `-round((qmin + qmax) / 2)`, ties to even.
    pub fn symmetric_offset(&self) -> f64 {
        -(((self.qmin + self.qmax) as f64 / 2.0).round_ties_even())
    }

    /// Whether float32 holds the grid's integers exactly (24 bits of mantissa); otherwise kernels
    /// compute in float64.
    pub fn fits_f32(&self) -> bool {
        const LIMIT: i64 = 1 << 24;
        self.qmin >= -LIMIT && self.qmax <= LIMIT && self.num_steps() <= LIMIT
    }
}

/// The smallest scale a quantizer uses: `min(eps_f32, 0.01 / num_steps)`, AIMET's rule. It keeps a
/// constant or all-zero tensor from dividing by zero.
pub fn minimum_scale(num_steps: i64) -> f64 {
    f64::from(f32::EPSILON).min(0.01 / num_steps as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitwidths_give_the_usual_grids() {
        let signed = AffineGrid::from_bitwidth(8, true).unwrap();
        assert_eq!((signed.qmin(), signed.qmax()), (-128, 127));
        assert_eq!(signed.symmetric_offset(), 0.0);
        let unsigned = AffineGrid::from_bitwidth(8, false).unwrap();
        assert_eq!((unsigned.qmin(), unsigned.qmax()), (0, 255));
        assert_eq!(unsigned.symmetric_offset(), -128.0);
        assert_eq!(
            AffineGrid::from_bitwidth(32, false).unwrap().num_steps(),
            u32::MAX as i64
        );
    }

    #[test]
    fn invalid_grids_are_refused_by_name() {
        for (lo, hi) in [(0, 0), (3, 2), (0, 1_i64 << 33)] {
            let message = AffineGrid::new(lo, hi, 0.0).unwrap_err().to_string();
            assert!(
                message.contains("qmin") && message.contains(&hi.to_string()),
                "{message}"
            );
        }
        assert!(AffineGrid::new(0, 15, 0.25).is_err());
        assert!(AffineGrid::from_bitwidth(0, true).is_err());
        assert!(AffineGrid::from_bitwidth(33, true).is_err());
    }

    #[test]
    fn grids_beyond_24_bits_ask_for_float64() {
        assert!(AffineGrid::from_bitwidth(24, true).unwrap().fits_f32());
        assert!(AffineGrid::from_bitwidth(24, false).unwrap().fits_f32());
        assert!(!AffineGrid::from_bitwidth(25, false).unwrap().fits_f32());
        assert!(!AffineGrid::from_bitwidth(32, true).unwrap().fits_f32());
    }

    #[test]
    fn minimum_scale_is_float_epsilon_up_to_16_bits() {
        assert_eq!(minimum_scale(15), f64::from(f32::EPSILON));
        assert_eq!(minimum_scale(65535), f64::from(f32::EPSILON));
        assert_eq!(minimum_scale(u32::MAX as i64), 0.01 / u32::MAX as f64);
    }
}
