//! Walking a stretch of memory in pieces that share an encoding.

use crate::encoding::{BlockGeometry, GeometryDim, MAX_DIMS};

/// A piece of memory: whole iterations of the innermost loop, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First element, in memory order.
    pub start: usize,
    /// Number of elements of each run.
    pub len: usize,
    /// How many runs of `len` elements follow each other. More than one only if each is a whole
    /// iteration of the innermost loop: without this, short blocks would cost more to find than to compute.
    pub count: usize,
    /// Encoding of the first element.
    pub group: usize,
    /// How far the encoding moves from run to run.
    pub group_step: usize,
    /// Which iteration of the innermost loop the first run is, counted from the beginning of memory.
    pub run: usize,
}

/// The pieces of `begin..end`, in order. Within a run the encoding moves by `inner_stride` per
/// element (0: all share one).
pub struct Pieces<'a> {
    outer: &'a [GeometryDim],
    middle: GeometryDim,
    inner: usize,
    /// How far the encoding moves from element to element of a run.
    pub inner_stride: usize,
    index: [usize; 2 * MAX_DIMS],
    outer_group: usize,
    middle_index: usize,
    run: usize,
    position: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    /// The pieces of the elements `begin..end`.
    #[inline]
    pub fn new(geometry: &'a BlockGeometry, begin: usize, end: usize) -> Self {
        const ONCE: GeometryDim = GeometryDim {
            size: 1,
            group_stride: 0,
        };
        let (outer, middle, inner) = match geometry.dims() {
            [] => (&[][..], ONCE, ONCE),
            [inner] => (&[][..], ONCE, *inner),
            [outer @ .., middle, inner] => (outer, *middle, *inner),
        };
        let run = begin / inner.size;
        let mut index = [0; 2 * MAX_DIMS];
        let mut outer_group = 0;
        let mut rest = run / middle.size;
        for (i, d) in outer.iter().enumerate().rev() {
            index[i] = rest % d.size;
            outer_group += index[i] * d.group_stride;
            rest /= d.size;
        }
        Self {
            outer,
            middle,
            inner: inner.size,
            inner_stride: inner.group_stride,
            index,
            outer_group,
            middle_index: run % middle.size,
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
        let left = self.end - self.position;
        let inside = self.position - self.run * self.inner;
        let (len, count) = if inside == 0 && left >= self.inner {
            let runs = self.middle.size - self.middle_index;
            (self.inner, runs.min(left / self.inner))
        } else {
            (left.min(self.inner - inside), 1)
        };
        let piece = Piece {
            start: self.position,
            len,
            count,
            group: self.outer_group
                + self.middle_index * self.middle.group_stride
                + inside * self.inner_stride,
            group_step: self.middle.group_stride,
            run: self.run,
        };
        self.position += len * count;
        if inside + len == self.inner {
            self.run += count;
            self.middle_index += count;
            if self.middle_index == self.middle.size {
                self.middle_index = 0;
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
        }
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_any_stretch_with_the_right_groups() {
        let cases: [(&[i64], &[i64], &[i64]); 6] = [
            (&[2, 3, 2, 4], &[2, 3, 2, 1], &[1, 1, 1, 4]),
            (&[2, 2, 6, 4], &[2, 1, 3, 2], &[1, 2, 2, 2]),
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
                        for r in 0..piece.count {
                            for j in 0..piece.len {
                                let group = piece.group + r * piece.group_step + j * stride;
                                assert_eq!(group, g.group_of(next + j));
                            }
                            next += piece.len;
                        }
                    }
                    assert_eq!(next, end);
                }
            }
        }
    }
}
