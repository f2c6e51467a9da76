//! Which encoding belongs to which element: per-tensor, per-channel, blockwise, one description.

use crate::error::{Error, Result};

/// Most dimensions a tensor may have (torch's own limit for most kernels is 64; 16 keeps the
/// description on the stack).
pub const MAX_DIMS: usize = 16;

/// One loop of the nest that walks a tensor in memory order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GeometryDim {
    /// Number of iterations.
    pub size: usize,
    /// How far one iteration moves in the (row-major) encoding; 0 inside a block.
    pub group_stride: usize,
}

/// A map from the elements of a dense tensor, in memory order, to the elements of its encoding.
///
/// Every granularity is a nest of loops over memory, each of which either stays within one block
/// (`group_stride == 0`) or moves from encoding to encoding. Neighbouring loops that can be one are
/// merged, so per-tensor is one loop, per-channel on axis 0 two, and so on.
///
/// ```
/// use rimet::encoding::BlockGeometry;
/// // A weight [4, 6] with one scale for every block [1, 3]: scale [4, 2].
/// let g = BlockGeometry::new(&[4, 6], &[6, 1], &[4, 2], Some(&[1, 3])).unwrap();
/// assert_eq!(g.num_groups(), 8);
/// assert_eq!((0..24).map(|i| g.group_of(i)).collect::<Vec<_>>()[0..7], [0, 0, 0, 1, 1, 1, 2]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BlockGeometry {
    dims: [GeometryDim; 2 * MAX_DIMS],
    len: usize,
    numel: usize,
    num_groups: usize,
}

impl BlockGeometry {
    /// The geometry of an encoding of shape `encoding` over a dense tensor.
    ///
    /// - `sizes`, `strides`: of the tensor; it must be non-overlapping and dense, in any order of
    ///   dimensions (contiguous, channels-last, transposed).
    /// - `encoding`: the shape of scale and offset. Aligned with the tensor's trailing dimensions.
    /// - `block`: one entry for each dimension of `encoding`; the tensor's dimension must be
    ///   `encoding[i] * block[i]`; `-1` stands for whatever makes it so. `None`: a dimension of
    ///   `encoding` is 1 or the tensor's, as in broadcasting.
    ///
    /// # Errors
    /// [`Error::Value`] that names the dimension, the expected and the given size.
    pub fn new(
        sizes: &[i64],
        strides: &[i64],
        encoding: &[i64],
        block: Option<&[i64]>,
    ) -> Result<Self> {
        let ndim = sizes.len();
        if ndim > MAX_DIMS {
            return Err(Error::value(
                "input",
                format!("a tensor of at most {MAX_DIMS} dimensions"),
                format!("{ndim} dimensions"),
            ));
        }
        // Leading ones in the encoding beyond the tensor's dimensions change nothing.
        let extra = encoding.len().saturating_sub(ndim);
        if encoding[..extra].iter().any(|&e| e != 1) {
            return Err(Error::value(
                "scale",
                format!("a shape that broadcasts to the input's {sizes:?}"),
                format!("{encoding:?}"),
            ));
        }
        if let Some(block) = block {
            if block.len() != encoding.len() {
                return Err(Error::value(
                    "block_size",
                    format!(
                        "one entry for each of the {} dimensions of scale",
                        encoding.len()
                    ),
                    format!("{block:?}"),
                ));
            }
        }

        // Per tensor dimension: (number of encodings along it, elements in one block, group stride).
        let mut split = [(1_usize, 0_usize, 0_usize); MAX_DIMS];
        let mut group_stride = 1_usize;
        for axis in (0..ndim).rev() {
            let size = sizes[axis];
            let from_end = ndim - 1 - axis;
            if from_end >= encoding.len() {
                split[axis] = (1, size as usize, 0);
                continue;
            }
            let i = encoding.len() - 1 - from_end;
            let groups = encoding[i];
            let length = match block.map(|b| b[i]) {
                None => {
                    if groups == size {
                        1
                    } else if groups == 1 {
                        size
                    } else {
                        return Err(Error::value(
                            "scale",
                            format!(
                                "a shape that broadcasts to the input's {sizes:?} (dimension {i}: 1 or {size})"
                            ),
                            format!("{encoding:?}"),
                        ));
                    }
                }
                Some(b) => {
                    let divides =
                        groups > 0 && size % groups == 0 && (b == -1 || b == size / groups);
                    if !divides || (b < 1 && b != -1) {
                        return Err(Error::value(
                            "block_size",
                            format!(
                                "scale.shape[{i}] * block_size[{i}] == {size}, the input's size of dimension {axis}"
                            ),
                            format!("{groups} * {b} (input {sizes:?}, scale {encoding:?})"),
                        ));
                    }
                    size / groups
                }
            };
            split[axis] = (groups as usize, length as usize, group_stride);
            group_stride *= groups as usize;
        }
        let num_groups = encoding.iter().product::<i64>().max(0) as usize;
        let numel = sizes.iter().product::<i64>().max(0) as usize;

        // Outermost dimension in memory first.
        let mut order = [0_usize; MAX_DIMS];
        for (axis, slot) in order.iter_mut().enumerate().take(ndim) {
            *slot = axis;
        }
        order[..ndim].sort_by_key(|&axis| std::cmp::Reverse(strides[axis]));

        let mut geometry = Self {
            dims: [GeometryDim::default(); 2 * MAX_DIMS],
            len: 0,
            numel,
            num_groups,
        };
        if numel > 0 {
            for &axis in &order[..ndim] {
                let (groups, length, stride) = split[axis];
                geometry.push(groups, stride);
                geometry.push(length, 0);
            }
        }
        Ok(geometry)
    }

    /// Adds an inner loop, merged into the one around it where both walk alike.
    fn push(&mut self, size: usize, group_stride: usize) {
        if size == 1 {
            return;
        }
        if let Some(last) = self.dims[..self.len].last_mut() {
            let both_inside = last.group_stride == 0 && group_stride == 0;
            let both_across = group_stride != 0 && last.group_stride == size * group_stride;
            if both_inside || both_across {
                last.size *= size;
                last.group_stride = group_stride;
                return;
            }
        }
        self.dims[self.len] = GeometryDim { size, group_stride };
        self.len += 1;
    }

    /// The loops, outermost first. Empty for a tensor of one element (or none).
    pub fn dims(&self) -> &[GeometryDim] {
        &self.dims[..self.len]
    }

    /// Number of elements of the tensor.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Number of elements of the encoding.
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// The innermost loop, in memory order; a single iteration for a tensor without dimensions.
    pub fn inner(&self) -> GeometryDim {
        self.dims().last().copied().unwrap_or(GeometryDim {
            size: 1,
            group_stride: 0,
        })
    }

    /// Whether one encoding serves the whole tensor.
    pub fn is_uniform(&self) -> bool {
        self.dims().iter().all(|d| d.group_stride == 0)
    }

    /// The encoding's element for the `index`-th element in memory. For tests and odd corners; the
    /// kernels walk the loops.
    pub fn group_of(&self, mut index: usize) -> usize {
        let mut group = 0;
        for d in self.dims().iter().rev() {
            group += (index % d.size) * d.group_stride;
            index /= d.size;
        }
        group
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contiguous(sizes: &[i64]) -> Vec<i64> {
        let mut strides = vec![1; sizes.len()];
        for i in (1..sizes.len()).rev() {
            strides[i - 1] = strides[i] * sizes[i].max(1);
        }
        strides
    }

    fn geometry(sizes: &[i64], encoding: &[i64], block: Option<&[i64]>) -> BlockGeometry {
        BlockGeometry::new(sizes, &contiguous(sizes), encoding, block).unwrap()
    }

    #[test]
    fn loops_are_merged() {
        assert_eq!(geometry(&[4, 5, 6], &[], None).dims().len(), 1);
        assert_eq!(geometry(&[4, 5, 6], &[1], None).dims().len(), 1);
        assert_eq!(geometry(&[4, 5, 6], &[4, 1, 1], None).dims().len(), 2);
        assert_eq!(geometry(&[4, 5, 6], &[4, 5, 6], None).dims().len(), 1);
        // Blocks along the input channels of a convolution: [O, I/b] encodings, b*kh*kw in a run.
        let conv = geometry(&[8, 16, 3, 3], &[8, 4, 1, 1], Some(&[1, 4, 3, 3]));
        assert_eq!(conv.dims().len(), 2);
        assert_eq!(conv.inner().size, 36);
    }

    #[test]
    fn channels_last_is_walked_in_memory_order() {
        // NCHW sizes with NHWC strides: channels are innermost.
        let g = BlockGeometry::new(&[2, 3, 4, 5], &[60, 1, 15, 3], &[3, 1, 1], None).unwrap();
        assert_eq!(
            g.dims(),
            [
                GeometryDim {
                    size: 40,
                    group_stride: 0
                },
                GeometryDim {
                    size: 3,
                    group_stride: 1
                }
            ]
        );
    }

    #[test]
    fn errors_name_the_dimension() {
        let e = BlockGeometry::new(&[4, 6], &[6, 1], &[4, 4], Some(&[1, 2])).unwrap_err();
        assert!(
            e.to_string().contains("dimension 1") && e.to_string().contains("4 * 2"),
            "{e}"
        );
        let e = BlockGeometry::new(&[4, 6], &[6, 1], &[3, 1], None).unwrap_err();
        assert!(e.to_string().contains("dimension 0"), "{e}");
        assert!(BlockGeometry::new(&[4, 6], &[6, 1], &[4, 2], Some(&[3])).is_err());
        assert!(BlockGeometry::new(&[4, 6], &[6, 1], &[4, 2], Some(&[1, 0])).is_err());
        assert!(BlockGeometry::new(&[4, 6], &[6, 1], &[2, 4, 6], None).is_err());
        assert!(BlockGeometry::new(&[4, 6], &[6, 1], &[0, 6], Some(&[-1, 1])).is_err());
    }

    proptest::proptest! {
        /// `group_of` against the definition: block indices from the coordinates, for every order of
        /// dimensions in memory.
        #[test]
        fn every_element_finds_its_block(
            parts in proptest::collection::vec((1_i64..5, 1_i64..5), 1..5),
            order_seed in 0_usize..24,
            drop in 0_usize..3,
        ) {
            let ndim = parts.len();
            let drop = drop.min(ndim - 1);
            let sizes: Vec<i64> = parts.iter().enumerate()
                .map(|(i, &(g, b))| if i < drop { g } else { g * b }).collect();
            let encoding: Vec<i64> = parts[drop..].iter().map(|p| p.0).collect();
            let block: Vec<i64> = parts[drop..].iter().map(|p| p.1).collect();
            // A permutation of memory order.
            let mut order: Vec<usize> = (0..ndim).collect();
            let mut seed = order_seed;
            for i in (1..ndim).rev() { order.swap(i, seed % (i + 1)); seed /= i + 1; }
            let mut strides = vec![0_i64; ndim];
            let mut step = 1;
            for &axis in order.iter().rev() { strides[axis] = step; step *= sizes[axis]; }

            let g = BlockGeometry::new(&sizes, &strides, &encoding, Some(&block)).unwrap();
            let numel: i64 = sizes.iter().product();
            proptest::prop_assert_eq!(g.numel(), numel as usize);
            for index in 0..numel {
                let mut expected = 0;
                for axis in 0..ndim {
                    let coordinate = (index / strides[axis]) % sizes[axis];
                    if axis >= drop {
                        let k = axis - drop;
                        expected = expected * encoding[k] + coordinate / block[k];
                    }
                }
                proptest::prop_assert_eq!(g.group_of(index as usize), expected as usize);
            }
        }
    }
}
