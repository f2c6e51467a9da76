//! Hands out the elements of a group as float32 slices, whatever the dtype and the memory layout.

use super::Values;
use crate::encoding::BlockGeometry;
use std::ops::Range;

/// Elements converted or gathered at a time: a few KiB, so that a second look at them is free.
pub(super) const CHUNK: usize = 2048;

/// Distance of the buffers of a tile: not a power of two, or they would share cache sets.
const COLUMN: usize = CHUNK + 16;

/// Shorter stretches of memory than this are gathered into a buffer first.
const DIRECT_RUN: usize = 64;

/// Most groups in a tile: float32 elements in a cache line.
const TILE: usize = 16;

/// The geometry seen from a group: where it starts, and the loops over its elements.
#[derive(Debug)]
pub(super) struct GroupWalk {
    /// Loops from group to group: (iterations, step in the group index, step in memory).
    across: Vec<(usize, usize, usize)>,
    /// Loops inside a group, outermost first: (iterations, step in memory).
    inside: Vec<(usize, usize)>,
    /// Length of the contiguous stretches a group is made of.
    run: usize,
    groups: usize,
    per_group: usize,
    /// How many groups lie side by side, element by element, at the innermost level of memory.
    adjacent: usize,
}

impl GroupWalk {
    pub(super) fn new(geometry: &BlockGeometry) -> Self {
        let mut across = Vec::new();
        let mut inside = Vec::new();
        let mut step = 1;
        let mut adjacent = 1;
        for (depth, dim) in geometry.dims().iter().rev().enumerate() {
            if dim.group_stride == 0 {
                inside.push((dim.size, step));
            } else {
                across.push((dim.size, dim.group_stride, step));
                if depth == 0 && dim.group_stride == 1 {
                    adjacent = dim.size;
                }
            }
            step *= dim.size;
        }
        inside.reverse();
        let run = match inside.last() {
            Some(&(size, 1)) => {
                inside.pop();
                size
            }
            _ => 1,
        };
        let groups = geometry.num_groups();
        Self {
            across,
            inside,
            run,
            groups,
            per_group: geometry.numel() / groups.max(1),
            adjacent,
        }
    }

    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    /// Elements of one group (all groups have as many).
    pub(super) fn per_group(&self) -> usize {
        self.per_group
    }

    /// The groups in portions that are best read together: those that share cache lines.
    pub(super) fn tiles(&self) -> Vec<Range<usize>> {
        if self.run > 1 || self.adjacent == 1 {
            return (0..self.groups).map(|group| group..group + 1).collect();
        }
        let line = |start| (start..start + self.adjacent).step_by(TILE);
        (0..self.groups)
            .step_by(self.adjacent)
            .flat_map(|start| {
                line(start).map(move |from| from..(from + TILE).min(start + self.adjacent))
            })
            .collect()
    }

    /// Position in memory of a group's first element.
    fn base(&self, group: usize) -> usize {
        self.across
            .iter()
            .map(|&(size, group_step, step)| (group / group_step) % size * step)
            .sum()
    }

    /// Position in memory of the `run`-th stretch of a group, from the group's first element.
    fn run_offset(&self, mut run: usize) -> usize {
        let mut offset = 0;
        for &(size, step) in self.inside.iter().rev() {
            offset += run % size * step;
            run /= size;
        }
        offset
    }

    /// Calls `body(group, slice)` until it has seen elements `range` of each group of `groups`, in
    /// order within each group. `groups` is one of [`Self::tiles`].
    pub(super) fn for_each_slice(
        &self,
        values: Values<'_>,
        groups: Range<usize>,
        range: Range<usize>,
        scratch: &mut Scratch,
        mut body: impl FnMut(usize, &[f32]),
    ) {
        match values {
            Values::F32(v) => {
                if self.run >= DIRECT_RUN {
                    for group in groups {
                        self.direct(v, group, range.clone(), |slice| body(group, slice));
                    }
                } else {
                    self.gathered(v, |&x| x, groups, range, scratch, body);
                }
            }
            // Rounds to nearest; a value beyond float32's range becomes infinite.
            Values::F64(v) => self.gathered(v, |&x| x as f32, groups, range, scratch, body),
            Values::F16(v) => self.gathered(v, |x| x.to_f32(), groups, range, scratch, body),
            Values::Bf16(v) => self.gathered(v, |x| x.to_f32(), groups, range, scratch, body),
        }
    }

    /// Stretches of memory as they are, in pieces of at most [`CHUNK`].
    fn direct(&self, v: &[f32], group: usize, range: Range<usize>, mut body: impl FnMut(&[f32])) {
        let base = self.base(group);
        let mut at = range.start;
        while at < range.end {
            let within = at % self.run;
            let length = (self.run - within).min(range.end - at).min(CHUNK);
            let start = base + self.run_offset(at / self.run) + within;
            body(&v[start..start + length]);
            at += length;
        }
    }

    /// Copies the elements into one buffer per group, converting them, and hands these over.
    fn gathered<T>(
        &self,
        v: &[T],
        convert: impl Fn(&T) -> f32,
        groups: Range<usize>,
        range: Range<usize>,
        scratch: &mut Scratch,
        mut body: impl FnMut(usize, &[f32]),
    ) {
        let width = groups.len();
        let base = self.base(groups.start);
        let buffer = &mut scratch.0;
        buffer.resize(width * COLUMN, 0.0);
        let mut at = range.start;
        while at < range.end {
            let filled = CHUNK.min(range.end - at);
            let mut done = 0;
            while done < filled {
                let element = at + done;
                let within = element % self.run;
                let length = (self.run - within).min(filled - done);
                let start = base + self.run_offset(element / self.run) + within;
                if width == 1 {
                    let from = &v[start..start + length];
                    for (to, x) in buffer[done..done + length].iter_mut().zip(from) {
                        *to = convert(x);
                    }
                } else {
                    // Tiles exist for runs of one element only: neighbours in memory are
                    // neighbouring groups.
                    for (column, x) in v[start..start + width].iter().enumerate() {
                        buffer[column * COLUMN + done] = convert(x);
                    }
                }
                done += length;
            }
            for column in 0..width {
                body(groups.start + column, &buffer[column * COLUMN..][..filled]);
            }
            at += filled;
        }
    }
}

/// A buffer that each thread keeps.
#[derive(Default)]
pub(super) struct Scratch(Vec<f32>);

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Every group gets exactly its own elements, whatever the order of dimensions in memory.
        #[test]
        fn groups_get_their_elements(
            parts in proptest::collection::vec((1_i64..5, 1_i64..5), 1..5),
            order_seed in 0_usize..24,
        ) {
            let ndim = parts.len();
            let sizes: Vec<i64> = parts.iter().map(|&(g, b)| g * b).collect();
            let encoding: Vec<i64> = parts.iter().map(|p| p.0).collect();
            let block: Vec<i64> = parts.iter().map(|p| p.1).collect();
            let mut order: Vec<usize> = (0..ndim).collect();
            let mut seed = order_seed;
            for i in (1..ndim).rev() { order.swap(i, seed % (i + 1)); seed /= i + 1; }
            let mut strides = vec![0_i64; ndim];
            let mut step = 1;
            for &axis in order.iter().rev() { strides[axis] = step; step *= sizes[axis]; }
            let geometry = BlockGeometry::new(&sizes, &strides, &encoding, Some(&block)).unwrap();
            let data: Vec<f32> = (0..geometry.numel()).map(|i| i as f32).collect();
            let wide: Vec<f64> = data.iter().map(|&x| f64::from(x)).collect();

            let mut expected = vec![Vec::new(); geometry.num_groups()];
            for (i, &x) in data.iter().enumerate() { expected[geometry.group_of(i)].push(x); }

            let walk = GroupWalk::new(&geometry);
            for values in [Values::F32(&data), Values::F64(&wide)] {
                let mut seen = vec![Vec::new(); geometry.num_groups()];
                let mut scratch = Scratch::default();
                let half = walk.per_group() / 2;
                for tile in walk.tiles() {
                    for range in [0..half, half..walk.per_group()] {
                        walk.for_each_slice(values, tile.clone(), range, &mut scratch, |g, s| {
                            seen[g].extend_from_slice(s);
                        });
                    }
                }
                for (group, (seen, expected)) in seen.iter_mut().zip(&mut expected).enumerate() {
                    seen.sort_by(f32::total_cmp);
                    expected.sort_by(f32::total_cmp);
                    proptest::prop_assert_eq!(&*seen, &*expected, "group {}", group);
                }
            }
        }
    }
}
