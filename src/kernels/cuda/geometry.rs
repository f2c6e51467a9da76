//! Block geometry as kernels take it. Twins of the structs in `csrc/cuda/geometry.cuh`.

use super::kernel::{ACCESSES, THREADS};
use crate::encoding::{BlockGeometry, GeometryDim, MAX_DIMS};

const MAX_LOOPS: usize = 2 * MAX_DIMS;

/// A divisor with the multiplication that replaces the division below 2^31.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Divider {
    divisor: u64,
    magic: u32,
    shift: u32,
}

impl Divider {
    fn new(divisor: u64) -> Self {
        if divisor == 0 || divisor >> 31 != 0 {
            // Kernels see the size of the divisor and divide; a divisor of 0 is a count of nothing.
            return Self {
                divisor,
                magic: 0,
                shift: 0,
            };
        }
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = (((1_u64 << shift) - divisor) << 32) / divisor + 1;
        Self {
            divisor,
            magic: magic as u32,
            shift,
        }
    }
}

/// A loop around the innermost one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Loop {
    size: Divider,
    row_stride: u64,
    group_stride: u64,
}

/// The innermost loop, and those around it, innermost first.
fn split(geometry: &BlockGeometry) -> (GeometryDim, Vec<Loop>) {
    let single = GeometryDim {
        size: 1,
        group_stride: 0,
    };
    let (inner, outer) = match geometry.dims().split_last() {
        None => (single, &[][..]),
        Some((last, outer)) => (*last, outer),
    };
    let mut row_stride = 1;
    let loops = outer
        .iter()
        .rev()
        .map(|dim| {
            let here = Loop {
                size: Divider::new(dim.size as u64),
                row_stride,
                group_stride: dim.group_stride as u64,
            };
            row_stride *= dim.size as u64;
            here
        })
        .collect();
    (inner, loops)
}

fn table(loops: &[Loop]) -> [Loop; MAX_LOOPS] {
    let mut table = [Loop::default(); MAX_LOOPS];
    table[..loops.len()].copy_from_slice(loops);
    table
}

/// A tensor walked in memory order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    numel: u64,
    inner: Divider,
    inner_stride: u64,
    uniform: u32,
    loop_count: u32,
    loops: [Loop; MAX_LOOPS],
}

impl Geometry {
    /// From the loops of a geometry.
    pub fn new(geometry: &BlockGeometry) -> Self {
        let (inner, loops) = split(geometry);
        Self {
            numel: geometry.numel() as u64,
            inner: Divider::new(inner.size as u64),
            inner_stride: inner.group_stride as u64,
            uniform: u32::from(geometry.is_uniform()),
            loop_count: loops.len() as u32,
            loops: table(&loops),
        }
    }

    /// Blocks of `elementwise` for `width` elements an access.
    pub fn blocks(&self, width: u64) -> u64 {
        self.numel.div_ceil(THREADS * ACCESSES * width)
    }
}

/// A tensor cut into units of work for a reduction.
///
/// The cut follows from the geometry and the dtype alone, and so does the order of every sum.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReducePlan {
    inner: u64,
    inner_stride: u64,
    num_groups: u64,
    reduced: Divider,
    parts: Divider,
    part_size: u64,
    tiles: Divider,
    units: u64,
    team: u32,
    combine_team: u32,
    direct: u32,
    kept_loops: u32,
    loop_count: u32,
    loops: [Loop; MAX_LOOPS],
}

/// Elements that a block takes of a large tensor, at the least: enough that 16-byte accesses of all its threads are
/// under way several times over.
const PART: u64 = 8192;
/// Blocks beyond which they take more each, so that few partial results are left to combine.
const MANY_BLOCKS: u64 = 16_384;
/// Elements that a thread may add up in the compute type (docs/numerics.md).
const MAX_SUM: u64 = 256;
/// Threads along a row in `reduce_columns`.
const MAX_ACROSS: u64 = 32;

impl ReducePlan {
    /// The plan for a geometry, with `width` elements an access.
    pub fn new(geometry: &BlockGeometry, width: u64) -> Self {
        let num_groups = geometry.num_groups() as u64;
        if geometry.numel() == 0 {
            return Self::of_nothing(num_groups);
        }
        let (inner, loops) = split(geometry);
        let (kept, reduced): (Vec<Loop>, Vec<Loop>) =
            loops.into_iter().partition(|l| l.group_stride != 0);
        let count =
            |loops: &[Loop]| -> u64 { loops.iter().map(|l| l.size.divisor).product::<u64>() };
        let (kept_rows, reduced_rows) = (count(&kept), count(&reduced));
        let size = inner.size as u64;
        let mut plan = Self {
            inner: size,
            inner_stride: inner.group_stride as u64,
            num_groups,
            reduced: Divider::new(reduced_rows),
            kept_loops: kept.len() as u32,
            loop_count: (kept.len() + reduced.len()) as u32,
            loops: table(&[kept, reduced].concat()),
            ..Self::of_nothing(num_groups)
        };
        if inner.group_stride == 0 {
            plan.cut_runs(kept_rows * reduced_rows, width);
        } else {
            plan.cut_columns(kept_rows, reduced_rows, width);
        }
        plan
    }

    /// No elements: every encoding gets the result of nothing from `combine_partials`.
    fn of_nothing(num_groups: u64) -> Self {
        let groups = Loop {
            size: Divider::new(num_groups),
            row_stride: 0,
            group_stride: 1,
        };
        Self {
            inner: 1,
            inner_stride: 0,
            num_groups,
            reduced: Divider::new(0),
            parts: Divider::new(1),
            part_size: 1,
            tiles: Divider::new(1),
            units: 0,
            team: 1,
            combine_team: 1,
            direct: 0,
            kept_loops: 1,
            loop_count: 1,
            loops: table(&[groups]),
        }
    }

    fn cut_runs(&mut self, runs: u64, width: u64) {
        // Short runs: a few accesses a thread.
        let team = self
            .inner
            .div_ceil(4 * width)
            .next_power_of_two()
            .min(THREADS);
        let mut part = PART;
        while runs * self.inner.div_ceil(part) > MANY_BLOCKS && part < THREADS * MAX_SUM {
            part *= 2;
        }
        let parts = self.inner.div_ceil(part);
        // Parts of equal size, each beginning at a whole access.
        self.part_size = self.inner.div_ceil(parts).next_multiple_of(team * width);
        let parts = self.inner.div_ceil(self.part_size);
        self.parts = Divider::new(parts);
        self.units = runs * parts;
        self.team = team as u32;
        let partials = parts * self.reduced.divisor;
        self.direct = u32::from(partials == 1);
        self.combine_team = partials.next_power_of_two().min(THREADS) as u32;
    }

    fn cut_columns(&mut self, kept_rows: u64, reduced_rows: u64, width: u64) {
        let across = self
            .inner
            .div_ceil(width)
            .next_power_of_two()
            .min(MAX_ACROSS);
        let height = (THREADS / across).min(reduced_rows.next_power_of_two());
        let team = THREADS / height;
        let tiles = self.inner.div_ceil(team * width);
        let mut rows = height * (PART / (THREADS * width)).max(1);
        while kept_rows * tiles * reduced_rows.div_ceil(rows) > MANY_BLOCKS
            && rows < height * MAX_SUM
        {
            rows *= 2;
        }
        let parts = reduced_rows.div_ceil(rows);
        self.part_size = rows;
        self.parts = Divider::new(parts);
        self.tiles = Divider::new(tiles);
        self.units = kept_rows * parts * tiles;
        self.team = team as u32;
        self.direct = u32::from(parts == 1);
        // At least eight neighbouring encodings in a block, for whole accesses.
        self.combine_team = parts.next_power_of_two().min(THREADS / 8) as u32;
    }

    /// Whether `reduce_columns` takes the first step, or else `reduce_runs`.
    pub fn by_columns(&self) -> bool {
        self.inner_stride != 0
    }

    /// Blocks of the first step.
    pub fn blocks(&self) -> u64 {
        if self.by_columns() {
            self.units
        } else {
            self.units.div_ceil(THREADS / u64::from(self.team))
        }
    }

    /// Partial results that the first step leaves for the second; none if it finishes by itself.
    pub fn partials(&self) -> u64 {
        if self.direct != 0 {
            0
        } else if self.by_columns() {
            self.units / self.tiles.divisor * self.inner
        } else {
            self.units
        }
    }

    /// Blocks of the second step; none if there is none.
    pub fn combine_blocks(&self) -> u64 {
        if self.direct != 0 {
            0
        } else {
            self.num_groups
                .div_ceil(THREADS / u64::from(self.combine_team))
        }
    }

    /// Whether whole accesses of `width` elements begin at multiples of it, if the tensor's memory does.
    pub fn is_aligned(&self, width: u64) -> bool {
        let rows = if self.by_columns() {
            self.num_groups / self.inner * self.reduced.divisor
        } else {
            self.units / self.parts.divisor.max(1)
        };
        rows == 1 || self.inner.is_multiple_of(width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divide(n: u64, d: &Divider) -> u64 {
        if (n | d.divisor) >> 31 == 0 {
            let high = ((n * u64::from(d.magic)) >> 32) as u32;
            u64::from((high.wrapping_add(n as u32)) >> d.shift)
        } else {
            n / d.divisor
        }
    }

    proptest::proptest! {
        #[test]
        fn the_multiplication_is_the_division(n in 0_u64..1 << 31, d in 1_u64..1 << 31, small in 1_u64..300) {
            for d in [d, small, n.max(1), n + 1] {
                proptest::prop_assert_eq!(divide(n, &Divider::new(d)), n / d);
            }
        }

        /// Units cover the tensor once; no thread adds up more than its bound.
        #[test]
        fn plans_keep_to_their_bounds(
            outer in 1_i64..5000, inner in 1_i64..200_000, channels_inside: bool, wide: bool,
        ) {
            let width = if wide { 8 } else { 4 };
            let encoding: &[i64] = if channels_inside { &[1, inner] } else { &[outer, 1] };
            let g = BlockGeometry::new(&[outer, inner], &[inner, 1], encoding, None).unwrap();
            let plan = ReducePlan::new(&g, width);
            let team = u64::from(plan.team);
            if plan.by_columns() {
                proptest::prop_assert!(plan.part_size / (THREADS / team) <= MAX_SUM);
                proptest::prop_assert!(plan.part_size * plan.parts.divisor >= outer as u64);
                proptest::prop_assert!(plan.tiles.divisor * team * width >= inner as u64);
            } else if plan.inner > 1 {
                proptest::prop_assert!(plan.part_size / team <= MAX_SUM.max(4 * width));
                proptest::prop_assert!(plan.part_size * plan.parts.divisor >= plan.inner);
                proptest::prop_assert!(plan.part_size * (plan.parts.divisor - 1) < plan.inner);
                proptest::prop_assert_eq!(plan.part_size % width, 0);
            }
            proptest::prop_assert!(plan.blocks() < 1 << 31);
        }
    }
}
