//! Value types of quantization: integer grids, floating-point formats, and the geometry of encodings
//! over a tensor.
//!
//! Nothing here touches a tensor's data; a value of these types cannot hold an invalid state.

mod block;
mod float;
mod grid;

pub use block::{BlockGeometry, GeometryDim, MAX_DIMS};
pub use float::FloatFormat;
pub use grid::{minimum_scale, AffineGrid};
