//! Launching the skeletons of `csrc/cuda/elementwise.cuh` and `reduce.cuh` with the functors of `functor.cuh`. An
//! operation's module gives its names and its own arguments; the rest is here.

use super::device::Launcher;
use super::geometry::{Geometry, ReducePlan};
use super::kernel::{Kernel, Stored};
use super::Failure;
use crate::encoding::BlockGeometry;
use std::ffi::c_void;

/// Twin of `Tensors`: the memory of a functor's tensors, inputs first, then outputs.
#[repr(C)]
pub struct Tensors<const N: usize> {
    data: [*mut c_void; N],
    vectorized: u64,
}

impl<const N: usize> Tensors<N> {
    /// Tensors that are walked from their first element to the last.
    pub fn new(data: [*mut c_void; N]) -> Self {
        let aligned = data.iter().all(|pointer| pointer.addr() % 16 == 0);
        Self {
            data,
            vectorized: u64::from(aligned),
        }
    }

    /// The same, walked as a reduction's plan says, `width` elements at a time.
    pub fn planned(data: [*mut c_void; N], plan: &ReducePlan, width: u64) -> Self {
        let mut tensors = Self::new(data);
        tensors.vectorized &= u64::from(plan.is_aligned(width));
        tensors
    }
}

/// Twin of `ElementwiseArgs`; `A` is the twin of the functor's `Args`.
#[repr(C)]
struct ElementwiseArgs<A> {
    op: A,
    geometry: Geometry,
}

/// Twin of `ReduceArgs`.
#[repr(C)]
struct ReduceArgs<A> {
    op: A,
    partials: *mut c_void,
    plan: ReducePlan,
}

/// `elementwise<Map<operation, stored, compute>>`, for an operation whose arguments are `A`.
pub fn map_kernel<A>(file: &'static str, operation: &'static str, stored: Stored) -> Kernel {
    Kernel {
        file,
        function: "elementwise",
        functor: "Map",
        types: [operation, stored.name, stored.compute],
        argument_bytes: size_of::<ElementwiseArgs<A>>(),
    }
}

/// Runs `kernel` over every element.
///
/// # Safety
/// `op`'s pointers are to device memory of the geometry's size.
pub unsafe fn elementwise<A>(
    launcher: &Launcher<'_>,
    kernel: &Kernel,
    op: A,
    geometry: &BlockGeometry,
    stored: Stored,
) -> Result<(), Failure> {
    let geometry = Geometry::new(geometry);
    let blocks = geometry.blocks(stored.width());
    // SAFETY: by the contract.
    unsafe { launcher.launch(kernel, blocks, &ElementwiseArgs { op, geometry }) }
}

/// Each kernel once: operations and dtypes share the second step of a reduction.
pub fn distinct(kernels: impl IntoIterator<Item = Kernel>) -> Vec<Kernel> {
    let mut all = Vec::new();
    for kernel in kernels {
        if !all.contains(&kernel) {
            all.push(kernel);
        }
    }
    all
}

/// The kernels of a reduction.
pub struct ReduceKernels {
    runs: Kernel,
    columns: Kernel,
    combine: Kernel,
    partial_bytes: u64,
}

impl ReduceKernels {
    /// `reduce_runs` and `reduce_columns` of `functor<types..>`, whose arguments are `A`; and
    /// `combine_partials` of its base class `base<compute>`, whose `Partial` has `partial_bytes`.
    pub fn new<A>(
        file: &'static str,
        (functor, types): (&'static str, [&'static str; 3]),
        (base, compute): (&'static str, &'static str),
        partial_bytes: u64,
    ) -> Self {
        let kernel = |function, functor, types| Kernel {
            file,
            function,
            functor,
            types,
            argument_bytes: size_of::<ReduceArgs<A>>(),
        };
        Self {
            runs: kernel("reduce_runs", functor, types),
            columns: kernel("reduce_columns", functor, types),
            combine: kernel("combine_partials", base, [compute, "", ""]),
            partial_bytes,
        }
    }

    /// The reduction with `MapReduce<operation, stored, compute>`, whose class of sums, `sums<compute>`,
    /// has `num_sums` of them.
    pub fn of_sums<A>(
        file: &'static str,
        operation: &'static str,
        stored: Stored,
        (sums, num_sums): (&'static str, usize),
    ) -> Self {
        let types = [operation, stored.name, stored.compute];
        let partial_bytes = (num_sums * size_of::<f64>()) as u64;
        Self::new::<A>(
            file,
            ("MapReduce", types),
            (sums, stored.compute),
            partial_bytes,
        )
    }

    /// The three of them.
    pub fn all(&self) -> [Kernel; 3] {
        [self.runs, self.columns, self.combine]
    }
}

/// Reduces to one result per encoding, in one launch or two.
///
/// # Safety
/// `op`'s pointers are to device memory of the plan's sizes.
pub unsafe fn reduce<A>(
    launcher: &Launcher<'_>,
    kernels: &ReduceKernels,
    op: A,
    plan: ReducePlan,
) -> Result<(), Failure> {
    let bytes = plan.partials() * kernels.partial_bytes;
    let partials = if bytes == 0 {
        std::ptr::null_mut()
    } else {
        launcher.scratch::<u8>(bytes)?.cast()
    };
    let args = ReduceArgs { op, partials, plan };
    let first = if plan.by_columns() {
        &kernels.columns
    } else {
        &kernels.runs
    };
    // SAFETY: by the contract; the scratch memory holds every partial result, and the second launch follows
    // the first on the same stream.
    unsafe {
        launcher.launch(first, plan.blocks(), &args)?;
        launcher.launch(&kernels.combine, plan.combine_blocks(), &args)
    }
}
