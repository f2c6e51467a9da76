//! A few directions that hold most of the energy of a layer's inputs.
//!
//! For input rows `X` and orthonormal columns `V`, let `Q` be an orthonormal basis of the columns of `X V`. For every
//! vector `e`
//!
//! ```text
//! |X e|^2 >= |Q^T X e|^2 = |B e|^2,   B = M^(-1/2) (X^T X V)^T,   M = (X V)^T (X V)
//! ```
//!
//! whatever `V` is; the closer its columns are to the dominant right singular vectors of `X`, the closer the bound.
//! Activations have a mean far from zero, so that a few directions go a long way.

use super::random::Random;
use crate::error::Result;
use crate::kernels::cpu::seq_mse::DIRECTIONS;
use tch::{Kind, Tensor};

/// Rounds of subspace iteration.
const ROUNDS: usize = 1;
/// Directions with less than this share of the largest one's energy are left out: float32 does not hold them.
const LEAST_SHARE: f64 = 1e-6;

/// Close to the dominant right singular vectors of `rows`, `[n, K]`, by subspace iteration: `[K, r]`, orthonormal, `r`
/// at most [`DIRECTIONS`]. `None` if the rows are not finite.
pub fn dominant_directions(rows: &Tensor) -> Result<Option<Tensor>> {
    let size = rows.size();
    let count = (DIRECTIONS as i64).min(size[0]).min(size[1]);
    if count == 0 || !f64::try_from(rows.f_sum(Kind::Double)?)?.is_finite() {
        return Ok(None);
    }
    // The mean row, and sums with random signs.
    let mut random = Random::new(0);
    let signs: Vec<f32> = (0..size[0] * count)
        .map(|i| match random.next_u64() & 1 {
            1 if i % count != 0 => -1.0,
            _ => 1.0,
        })
        .collect();
    let signs = Tensor::f_from_slice(&signs)?
        .f_reshape([size[0], count])?
        .f_to_kind(rows.kind())?
        .f_to_device(rows.device())?;
    let transposed = rows.f_transpose(0, 1)?;
    let orthonormal =
        |columns: &Tensor| -> Result<Tensor> { Ok(Tensor::f_linalg_qr(columns, "reduced")?.0) };
    let mut basis = orthonormal(&transposed.f_matmul(&signs)?)?;
    for _ in 0..ROUNDS {
        let image = rows.f_matmul(&basis)?;
        basis = orthonormal(&transposed.f_matmul(&image)?)?;
    }
    let image = rows.f_matmul(&basis)?.f_to_kind(Kind::Double)?;
    let energy = image.f_transpose(0, 1)?.f_matmul(&image)?;
    let (_, rotation) = energy.f_linalg_eigh("L")?;
    Ok(Some(basis.f_matmul(&rotation.f_to_kind(rows.kind())?)?))
}

/// `M^(-1/2)` of `[r, r]`, as columns to multiply with from the right: `A` with `A A^T` the inverse on the directions
/// that count. `None` if `energy` is not finite.
pub fn whitening(energy: &Tensor) -> Result<Option<Tensor>> {
    if !f64::try_from(energy.f_sum(Kind::Double)?)?.is_finite() {
        return Ok(None);
    }
    let (values, vectors) = energy.f_linalg_eigh("L")?;
    let least = f64::try_from(values.f_max()?)?.max(0.0) * LEAST_SHARE;
    let counts = values.f_gt(least)?;
    let factors = values
        .f_clamp_min(f64::MIN_POSITIVE)?
        .f_rsqrt()?
        .f_where_self(&counts, &values.f_zeros_like()?)?;
    Ok(Some(vectors * factors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn bound(rows: &Tensor, e: &Tensor) -> (Tensor, Tensor) {
        let basis = dominant_directions(rows).unwrap().unwrap();
        let image = rows.matmul(&basis);
        let factor = whitening(&image.transpose(0, 1).matmul(&image))
            .unwrap()
            .unwrap();
        let directions = image.matmul(&factor).transpose(0, 1).matmul(rows);
        let square = |t: Tensor| (&t * &t).sum_dim_intlist([0_i64].as_slice(), false, None);
        (square(directions.matmul(e)), square(rows.matmul(e)))
    }

    #[test]
    fn it_bounds_from_below_and_closely_where_few_directions_hold_the_energy() {
        tch::manual_seed(0);
        let options = (Kind::Double, Device::Cpu);
        let e = Tensor::randn([40, 200], options);
        for rank in [1, 5, 40] {
            let rows =
                Tensor::randn([90, rank], options).matmul(&Tensor::randn([rank, 40], options));
            let (below, exact) = bound(&rows, &e);
            assert!(bool::try_from(below.le_tensor(&(&exact * (1.0 + 1e-9))).all()).unwrap());
            if rank <= DIRECTIONS as i64 {
                assert!(below.allclose(&exact, 1e-6, 0.0, false), "rank {rank}");
            }
        }
        let zeros = Tensor::zeros([7, 40], options);
        assert_eq!(
            f64::try_from(bound(&zeros, &e).0.sum(Kind::Double)).unwrap(),
            0.0
        );
    }

    #[test]
    fn rows_that_are_not_finite_have_none() {
        let rows = Tensor::full([3, 4], f64::NAN, (Kind::Float, Device::Cpu));
        assert!(dominant_directions(&rows).unwrap().is_none());
        assert!(whitening(&rows).unwrap().is_none());
    }
}
