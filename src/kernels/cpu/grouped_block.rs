//! Block scales as integer multiples of one scale per group of blocks (LPBQ), and the gradients back.
//!
//! `group_scale = max(scale) / levels` over a group; `scale' = clamp(round(scale / group_scale), 1,
//! levels) * group_scale`: a quantize-dequantize of the scales on the grid `1..=levels`, whose own
//! scale depends on the largest of them.

use super::affine::{self, Encodings, QuantizeDequantize};
use super::element::Compute;
use super::min_max::min_max;
use super::walk::Pieces;
use crate::encoding::{AffineGrid, BlockGeometry};
use crate::error::Result;
use std::ops::Range;

/// The groups of blocks, and what the integer scales are relative to.
struct Groups<'a, C> {
    geometry: &'a BlockGeometry,
    grid: AffineGrid,
    largest: Vec<C>,
    group_scale: Vec<C>,
    offset: Vec<C>,
}

impl<'a, C: Compute> Groups<'a, C> {
    fn new(geometry: &'a BlockGeometry, levels: i64, scale: &[C]) -> Result<Self> {
        assert_eq!(scale.len(), geometry.numel());
        // No quotient exceeds `levels`, so a grid of at least two points does for one level too.
        let grid = AffineGrid::new(1, levels.max(2), 0.0)?;
        // SAFETY: `scale` has `numel` elements.
        let ranges = unsafe { min_max::<C, C>(geometry, scale.as_ptr()) };
        let largest: Vec<C> = ranges.into_iter().map(|(_, high)| high).collect();
        let divisor = C::from_f64(levels as f64);
        let group_scale = largest.iter().map(|&high| high / divisor).collect();
        let offset = vec![C::ZERO; largest.len()];
        Ok(Self {
            geometry,
            grid,
            largest,
            group_scale,
            offset,
        })
    }

    fn encodings(&self) -> Encodings<'_, C> {
        Encodings {
            scale: &self.group_scale,
            offset: &self.offset,
        }
    }

    /// Calls `f` with stretches of blocks, the group of each one's first block, and how far the group moves
    /// from block to block.
    fn for_each_run(&self, mut f: impl FnMut(Range<usize>, usize, usize)) {
        let pieces = Pieces::new(self.geometry, 0, self.geometry.numel());
        let stride = pieces.inner_stride;
        for piece in pieces {
            for r in 0..piece.count {
                let start = piece.start + r * piece.len;
                f(
                    start..start + piece.len,
                    piece.group + r * piece.group_step,
                    stride,
                );
            }
        }
    }
}

/// Writes the scale of each block to `output` and returns that of each group. `geometry` says which
/// group a block belongs to.
///
/// # Errors
/// [`crate::Error::Value`] if `levels` is too large for a grid.
///
/// # Panics
/// If the slices are not of `geometry.numel()` elements.
pub fn forward<C: Compute>(
    geometry: &BlockGeometry,
    levels: i64,
    scale: &[C],
    output: &mut [C],
) -> Result<Vec<C>> {
    assert_eq!(output.len(), scale.len());
    let groups = Groups::new(geometry, levels, scale)?;
    // SAFETY: both slices have `numel` elements and do not overlap.
    unsafe {
        affine::forward::<QuantizeDequantize, C, C>(
            geometry,
            groups.encodings(),
            &groups.grid,
            scale.as_ptr(),
            output.as_mut_ptr(),
        );
    }
    Ok(groups.group_scale)
}

/// Writes to `output` the gradient of the block scales, given those of [`forward`]'s results: rounding
/// passes gradients on, and blocks that share the largest scale of their group share its gradient.
///
/// # Errors
/// As [`forward`].
///
/// # Panics
/// If the slices are not of `geometry.numel()`, or `grad_group` of `geometry.num_groups()`, elements.
pub fn backward<C: Compute>(
    geometry: &BlockGeometry,
    levels: i64,
    scale: &[C],
    grad: &[C],
    grad_group: &[C],
    output: &mut [C],
) -> Result<()> {
    assert!(grad.len() == scale.len() && output.len() == scale.len());
    assert_eq!(grad_group.len(), geometry.num_groups());
    let groups = Groups::new(geometry, levels, scale)?;
    // SAFETY: the slices have `numel` elements, and `output` overlaps none of the others.
    let sums = unsafe {
        affine::backward::<QuantizeDequantize, C, C, 1>(
            geometry,
            groups.encodings(),
            &groups.grid,
            grad.as_ptr(),
            scale.as_ptr(),
            output.as_mut_ptr(),
        )
    };
    let mut ties = vec![0_u32; sums.len()];
    groups.for_each_run(|run, first, stride| {
        for (j, &scale) in scale[run].iter().enumerate() {
            let group = first + j * stride;
            ties[group] += u32::from(scale == groups.largest[group]);
        }
    });
    let share: Vec<C> = (0..sums.len())
        .map(|group| {
            let through = (sums[group][0] + grad_group[group].to_f64()) / levels as f64;
            C::from_f64(through / f64::from(ties[group]))
        })
        .collect();
    groups.for_each_run(|run, first, stride| {
        for (j, (output, &scale)) in output[run.clone()].iter_mut().zip(&scale[run]).enumerate() {
            let group = first + j * stride;
            if scale == groups.largest[group] {
                *output = *output + share[group];
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(blocks: i64, per_group: i64) -> BlockGeometry {
        BlockGeometry::new(&[blocks], &[1], &[blocks / per_group], Some(&[per_group])).unwrap()
    }

    #[test]
    fn scales_become_multiples_of_their_groups() {
        let scale = [1.6_f32, 0.1, 0.34, 0.01, 3.0, 3.0, 1.0, 0.2];
        let mut snapped = [0.0; 8];
        let group = forward(&geometry(8, 4), 16, &scale, &mut snapped).unwrap();
        assert_eq!(group, [0.1, 0.1875]);
        let multiples: Vec<f32> = (0..8).map(|i| snapped[i] / group[i / 4]).collect();
        assert_eq!(multiples, [16.0, 1.0, 3.0, 1.0, 16.0, 16.0, 5.0, 1.0]);
    }

    #[test]
    fn one_level_gives_every_block_the_scale_of_its_group() {
        let mut snapped = [0.0; 3];
        let group = forward(&geometry(3, 3), 1, &[0.5_f64, 0.25, 0.1], &mut snapped).unwrap();
        assert_eq!((group[0], snapped), (0.5, [0.5; 3]));
    }

    #[test]
    fn the_largest_blocks_share_the_gradient_of_their_group() {
        let scale = [4.0_f64, 4.0, 1.1, 0.1];
        // levels = 4: group scale 1; quotients 4, 4, 1.1 (inside) and 0.1 (below the grid).
        let mut output = [0.0; 4];
        backward(
            &geometry(4, 4),
            4,
            &scale,
            &[1.0, 2.0, 4.0, 8.0],
            &[0.5],
            &mut output,
        )
        .unwrap();
        // To the group: inside g * (rounded - quotient), below g * 1; divided by levels and by two.
        let share = (4.0 * (1.0 - 1.1) + 8.0 + 0.5) / 4.0 / 2.0;
        approx::assert_relative_eq!(
            output[..],
            [1.0 + share, 2.0 + share, 4.0, 0.0][..],
            epsilon = 1e-12
        );
    }
}
