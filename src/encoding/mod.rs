//! Value types of quantization: integer grids and the geometry of encodings over a tensor.
//!
//! Nothing here touches a tensor's data; a value of these types cannot hold an invalid state.

mod block;
mod grid;

pub use block::{BlockGeometry, GeometryDim, MAX_DIMS};
pub use grid::{minimum_scale, AffineGrid};
