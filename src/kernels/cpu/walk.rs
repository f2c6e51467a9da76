//! Walking a stretch of memory in pieces that share an encoding.

use crate::encoding::{BlockGeometry, GeometryDim, MAX_DIMS};

/// A piece of memory inside one iteration of the innermost loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First element, in memory order.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
    /// Encoding of the first element.
    pub group: usize,
    /// Which iteration of the innermost loop, counted from the beginning of memory.
    pub run: usize,
}

/// The pieces of `begin..end`, in order. Within a piece the encoding moves by `inner_stride` per
/// element (0: all share one).
pub struct Pieces<'a> {
    outer: &'a [GeometryDim],
    inner: usize,
    /// How far the encoding moves from element to element of a piece.
    pub inner_stride: usize,
    index: [usize; 2 * MAX_DIMS],
    outer_group: usize,
    run: usize,
    position: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    /// The pieces of the elements `begin..end`.
    #[inline]
    pub fn new(geometry: &'a BlockGeometry, begin: usize, end: usize) -> Self {
        let dims = geometry.dims();
        let (outer, inner) = match dims.split_last() {
            None => (
                dims,
                GeometryDim {
                    size: 1,
                    group_stride: 0,
                },
            ),
            Some((last, outer)) => (outer, *last),
        };
        let run = begin / inner.size;
        let mut index = [0; 2 * MAX_DIMS];
        let mut outer_group = 0;
        let mut rest = run;
        for (i, d) in outer.iter().enumerate().rev() {
            index[i] = rest % d.size;
            outer_group += index[i] * d.group_stride;
            rest /= d.size;
        }
        Self {
            outer,
            inner: inner.size,
            inner_stride: inner.group_stride,
            index,
            outer_group,
            run,
            position: begin,
            end,
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        if self.position >= self.end {
            return None;
        }
        let run_begin = self.run * self.inner;
        let run_end = run_begin + self.inner;
        let piece = Piece {
            start: self.position,
            len: run_end.min(self.end) - self.position,
            group: self.outer_group + (self.position - run_begin) * self.inner_stride,
            run: self.run,
        };
        self.position += piece.len;
        if self.position == run_end {
            self.run += 1;
            for (i, d) in self.outer.iter().enumerate().rev() {
                self.index[i] += 1;
                self.outer_group += d.group_stride;
                if self.index[i] < d.size {
                    break;
                }
                self.outer_group -= d.size * d.group_stride;
                self.index[i] = 0;
            }
        }
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_any_stretch_with_the_right_groups() {
        let cases: [(&[i64], &[i64], &[i64]); 4] = [
            (&[3, 4, 5], &[3, 2, 1], &[1, 2, 5]),
            (&[3, 4, 5], &[4, 5], &[1, 1]),
            (&[6, 4], &[1], &[-1]),
            (&[2, 3, 4], &[2, 1, 4], &[1, 3, 1]),
        ];
        for (sizes, encoding, block) in cases {
            let mut strides = vec![1; sizes.len()];
            for i in (1..sizes.len()).rev() {
                strides[i - 1] = strides[i] * sizes[i];
            }
            let g = BlockGeometry::new(sizes, &strides, encoding, Some(block)).unwrap();
            for begin in 0..g.numel() {
                for end in begin..=g.numel() {
                    let mut next = begin;
                    let mut pieces = Pieces::new(&g, begin, end);
                    let stride = pieces.inner_stride;
                    for piece in &mut pieces {
                        assert_eq!(piece.start, next);
                        for j in 0..piece.len {
                            assert_eq!(piece.group + j * stride, g.group_of(next + j));
                        }
                        next += piece.len;
                    }
                    assert_eq!(next, end);
                }
            }
        }
    }
}
