//! Convolutions as a few matrix products over inputs that are prepared once.
//!
//! Where many weights meet the same inputs, as in an optimization, what depends on the inputs alone need not be
//! computed again for each of them. Two forms:
//!
//! - Rows: the inputs of every output place cut out of the input (im2col), times the weight's matrix.
//! - Minimal filtering \[winograd1980\], \[lavin2016\]: along a dimension, `m` neighbouring outputs `y` of a
//!   filter `g` of three taps, F(m, 3), are `y = A ((G g) * (B d))`, `*` element by element, of the `m + 2` inputs
//!   `d` that they depend on: as many products instead of `3 m`. (Lavin and Gray write `A^T` and `B^T` for `A` and
//!   `B`.) In several dimensions the matrices are Kronecker products, and with channels every product of elements
//!   becomes a matrix product. A 3x3 convolution takes 16 of these for four outputs, or 36 for sixteen, instead of
//!   36 and 144. With a gradient `y'` of the outputs, that of the filter is `G^T ((A^T y') * (B d))`, added up over
//!   tiles and samples.
//!
//! In both, a sample has a number of tiles, a tile `K` inputs in each of the products:
//! `[products, samples * tiles, K] x [products, K, out] -> [products, samples * tiles, out]`.

use super::linear_map::LinearMap;
use crate::error::Result;
use crate::ops::RowCombinations;
use tch::{Device, Tensor};

/// Multiply-adds in the time of reading or writing one element of what no core's own cache holds. Measured with
/// float32, products of the sizes of ResNet-18, AVX-512 and two cores: 55 to 95 million multiply-adds per
/// millisecond, 15 to 20 million elements.
const OPERATIONS_PER_ELEMENT: f64 = 5.0;

/// Taps of the filter of every [`Filter1d`].
const TAPS: usize = 3;

/// Minimal filtering along one dimension; matrices row by row.
#[derive(Clone, Debug)]
struct Filter1d {
    /// Neighbouring outputs that it gives.
    outputs: usize,
    products: usize,
    /// Inputs that it reads.
    inputs: usize,
    /// `B`: `[products, inputs]`.
    input: Vec<f64>,
    /// `G`: `[products, TAPS]`.
    kernel: Vec<f64>,
    /// `A`: `[outputs, products]`.
    output: Vec<f64>,
}

impl Filter1d {
    /// F(m, 3) with `m = points.len() - 1`: polynomials with the taps and the outputs as coefficients, multiplied at
    /// some points and at infinity (Toom and Cook), transposed \[barabasz2020\].
    fn toom_cook(points: &[f64]) -> Self {
        let products = points.len() + 1;
        let outputs = products + 1 - TAPS;
        // Coefficients of the product of `x - point`.
        let roots = |points: &mut dyn Iterator<Item = f64>| {
            let mut polynomial = vec![1.0];
            for point in points {
                polynomial.insert(0, 0.0);
                for i in 1..polynomial.len() {
                    polynomial[i - 1] -= point * polynomial[i];
                }
            }
            polynomial
        };
        let power = |product: usize, exponent: usize, last: usize| match points.get(product) {
            Some(point) => point.powi(exponent as i32),
            None => f64::from(u8::from(exponent == last)),
        };
        let (mut input, mut kernel) = (vec![], vec![]);
        for product in 0..products {
            let others = || {
                points
                    .iter()
                    .copied()
                    .enumerate()
                    .filter(|p| p.0 != product)
                    .map(|p| p.1)
            };
            let mut row = roots(&mut others());
            row.resize(products, 0.0);
            let slope: f64 = match points.get(product) {
                Some(point) => others().map(|other| point - other).product(),
                None => 1.0,
            };
            let taps = (0..TAPS).map(|tap| power(product, tap, TAPS - 1) / slope);
            let mut taps: Vec<f64> = taps.collect();
            // Numbers of like size on both sides, by a power of two.
            let largest = |row: &[f64]| row.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
            let factor = ((largest(&row) / largest(&taps)).log2() / 2.0)
                .round()
                .exp2();
            row.iter_mut().for_each(|x| *x /= factor);
            taps.iter_mut().for_each(|x| *x *= factor);
            input.extend(row);
            kernel.extend(taps);
        }
        let output = (0..outputs)
            .flat_map(|i| (0..products).map(move |product| power(product, i, outputs - 1)))
            .collect();
        Self {
            outputs,
            products,
            inputs: products,
            input,
            kernel,
            output,
        }
    }

    /// F(2, 3). In two dimensions its float32 results are off by 3e-7 of them (root mean squares), its weight
    /// gradients by 4e-7; torch's convolution by 2e-7 and 5e-7.
    fn f_2_3() -> Self {
        Self::toom_cook(&[0.0, 1.0, -1.0])
    }

    /// F(4, 3). At these points float32 is off by 1e-6 in both; at 0, 1, -1, 2 and -2, which are usual, by twice as
    /// much. An output's error is in proportion to the largest inputs of the tile, also those that it does not depend
    /// on.
    fn f_4_3() -> Self {
        Self::toom_cook(&[0.0, 0.75, -0.75, 1.5, -1.5])
    }

    /// The whole of a dimension of two, between zeros: `[g1 d0 + g2 d1, g0 d0 + g1 d1]`, with the product
    /// `g1 (d0 + d1)` shared (Karatsuba).
    #[rustfmt::skip]
    fn two_between_zeros() -> Self {
        Self {
            outputs: 2,
            products: 3,
            inputs: 2,
            input: vec![
                1.0, 0.0,
                1.0, 1.0,
                0.0, 1.0,
            ],
            kernel: vec![
                1.0, -1.0, 0.0,
                0.0, 1.0, 0.0,
                0.0, -1.0, 1.0,
            ],
            output: vec![
                0.0, 1.0, 1.0,
                1.0, 1.0, 0.0,
            ],
        }
    }
}

#[derive(Debug)]
struct Filtering {
    /// One for each dimension.
    filters: Vec<Filter1d>,
    /// Zeros ahead of the input.
    padding: Vec<i64>,
    /// Kronecker products of the filters' matrices, and of the transposed ones.
    input: RowCombinations,
    kernel: RowCombinations,
    kernel_transposed: RowCombinations,
    output: RowCombinations,
    output_transposed: RowCombinations,
}

impl Filtering {
    fn new(filters: Vec<Filter1d>, padding: Vec<i64>) -> Result<Self> {
        let kronecker = |matrix: &dyn Fn(&Filter1d) -> (&[f64], usize)| -> Result<Tensor> {
            let mut product = Tensor::from_slice(&[1.0_f64]).f_reshape([1, 1])?;
            for filter in &filters {
                let (values, columns) = matrix(filter);
                let matrix = Tensor::from_slice(values).f_reshape([-1, columns as i64])?;
                product = product.f_kron(&matrix)?;
            }
            Ok(product)
        };
        let combinations = |matrix: &Tensor| -> Result<RowCombinations> {
            let values: Vec<f64> = matrix.f_flatten(0, 1)?.try_into()?;
            RowCombinations::new(&values, matrix.size()[1] as usize)
        };
        let kernel = kronecker(&|filter| (&filter.kernel, TAPS))?;
        let output = kronecker(&|filter| (&filter.output, filter.products))?;
        Ok(Self {
            input: combinations(&kronecker(&|filter| (&filter.input, filter.inputs))?)?,
            kernel: combinations(&kernel)?,
            kernel_transposed: combinations(&kernel.f_transpose(0, 1)?)?,
            output: combinations(&output)?,
            output_transposed: combinations(&output.f_transpose(0, 1)?)?,
            filters,
            padding,
        })
    }
}

/// How a convolution is computed as matrix products.
#[derive(Debug)]
pub struct MatrixProducts<'a> {
    map: &'a LinearMap,
    weight_size: Vec<i64>,
    /// Sizes of the output's places.
    places: Vec<i64>,
    /// None: rows.
    filtering: Option<Box<Filtering>>,
}

impl<'a> MatrixProducts<'a> {
    /// By rows; None for linear layers, which are that already, and for groups.
    pub fn rows(map: &'a LinearMap, weight: &Tensor, places: &[i64]) -> Option<Self> {
        (matches!(map, LinearMap::Convolution { .. }) && map.groups() == 1).then(|| Self {
            map,
            weight_size: weight.size(),
            places: places.to_vec(),
            filtering: None,
        })
    }

    /// By minimal filtering, on the CPU: the ways that there are. None unless there are three taps in every
    /// dimension, side by side, one group, and a stride of one.
    ///
    /// # Errors
    /// What torch refuses.
    pub fn filtering(map: &'a LinearMap, weight: &Tensor, places: &[i64]) -> Result<Vec<Self>> {
        let LinearMap::Convolution {
            convolution: c,
            pad,
        } = map
        else {
            return Ok(vec![]);
        };
        let size = weight.size();
        let all = |list: &[i64], value: i64| list.iter().all(|&x| x == value);
        if weight.device() != Device::Cpu
            || c.transposed
            || c.groups != 1
            || !all(&size[2..], TAPS as i64)
            || !all(&c.stride, 1)
            || !all(&c.dilation, 1)
        {
            return Ok(vec![]);
        }
        let mut found = vec![];
        for filter in [Filter1d::f_2_3(), Filter1d::f_4_3()] {
            let (mut filters, mut padding) = (vec![], c.padding.clone());
            for (d, &length) in places.iter().enumerate() {
                if pad.is_none() && c.padding[d] == 1 && length == 2 {
                    filters.push(Filter1d::two_between_zeros());
                    padding[d] = 0;
                } else {
                    filters.push(filter.clone());
                }
            }
            let widest = |l: &Filter1d| l.inputs.max(l.products);
            if filters.iter().map(widest).product::<usize>() <= RowCombinations::MOST_COLUMNS {
                found.push(Self {
                    map,
                    weight_size: size.clone(),
                    places: places.to_vec(),
                    filtering: Some(Box::new(Filtering::new(filters, padding)?)),
                });
            }
        }
        Ok(found)
    }

    /// Whether it is minimal filtering.
    pub fn is_filtering(&self) -> bool {
        self.filtering.is_some()
    }

    /// Matrix products.
    pub fn products(&self) -> i64 {
        let of = |f: &Filtering| {
            f.filters
                .iter()
                .map(|filter| filter.products)
                .product::<usize>()
        };
        self.filtering.as_deref().map_or(1, of) as i64
    }

    /// Outputs of a tile.
    pub fn outputs(&self) -> i64 {
        (0..self.places.len())
            .map(|d| self.outputs_along(d))
            .product()
    }

    fn outputs_along(&self, d: usize) -> i64 {
        self.filtering
            .as_ref()
            .map_or(1, |f| f.filters[d].outputs as i64)
    }

    fn tiles_along(&self, d: usize) -> i64 {
        (self.places[d] as u64).div_ceil(self.outputs_along(d) as u64) as i64
    }

    /// Places along a dimension that the last tile has beyond the output's.
    fn beyond(&self, d: usize) -> i64 {
        self.outputs_along(d) * self.tiles_along(d) - self.places[d]
    }

    /// Tiles of a sample.
    pub fn tiles(&self) -> i64 {
        (0..self.places.len())
            .map(|d| self.tiles_along(d))
            .product()
    }

    /// Output places of a sample.
    pub fn places(&self) -> i64 {
        self.places.iter().product()
    }

    fn out_channels(&self) -> i64 {
        self.weight_size[usize::from(self.map.transposed())]
    }

    /// `K`: inputs of a tile in one product.
    fn depth(&self) -> i64 {
        let whole: i64 = self.weight_size.iter().product();
        let taps = self.weight_size[2..].iter().product::<i64>();
        whole / self.out_channels() / if self.is_filtering() { taps } else { 1 }
    }

    /// Multiply-adds of output and weight gradient of so many samples, and what the elements take that are
    /// moved meanwhile, in multiply-adds.
    pub fn operations(&self, samples: i64) -> f64 {
        let tiles = (samples * self.tiles()) as f64;
        let (depth, out) = (self.depth() as f64, self.out_channels() as f64);
        let products = self.products() as f64;
        // The samples' inputs are copied, the kernels and their gradients read and written. The transforms of
        // weight and output, one for each direction, read on one side and write on the other.
        let kernels = products * depth * out;
        let mut moved = 2.0 * (products * tiles * depth + kernels);
        if self.is_filtering() {
            let weight: i64 = self.weight_size.iter().product();
            moved += 2.0 * (weight as f64 + kernels);
            moved += 2.0 * (products + self.outputs() as f64) * tiles * out;
        }
        2.0 * products * tiles * depth * out + OPERATIONS_PER_ELEMENT * moved
    }

    /// Elements held while steps of some samples are computed: inputs and targets of all `samples`, and what a
    /// step, or the preparation of a batch, makes of `at_once` of them.
    pub fn elements(&self, samples: i64, at_once: i64) -> i64 {
        let (products, tiles) = (self.products(), self.tiles());
        let inputs = products * tiles * self.depth();
        let targets = self.outputs() * tiles * self.out_channels();
        let made = inputs.max(products * tiles * self.out_channels());
        samples * (inputs + targets)
            + at_once * (inputs + 2 * made + targets)
            + 2 * products * self.depth() * self.out_channels()
    }

    /// The order of dimensions in which the weight has to come: taps first for filtering.
    pub fn weight_order(&self) -> Vec<i64> {
        let dims = self.weight_size.len() as i64;
        if self.is_filtering() {
            (2..dims).chain([0, 1]).collect()
        } else {
            (0..dims).collect()
        }
    }

    /// A [padded](LinearMap::padded) input as the products take it: `[products, samples, tiles * K]`.
    ///
    /// # Errors
    /// What torch refuses, as in all that follow.
    pub fn inputs(&self, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let samples = input.size()[0];
        let Some(filtering) = &self.filtering else {
            return Ok(self.map.rows(input, weight)?.f_reshape([1, samples, -1])?);
        };
        let dims = self.places.len();
        let mut pad = vec![];
        for d in (0..dims).rev() {
            let step = self.outputs_along(d) * (self.tiles_along(d) - 1);
            let needed = step + filtering.filters[d].inputs as i64;
            let before = filtering.padding[d];
            pad.extend([before, needed - before - input.size()[2 + d]]);
        }
        let mut tiles = input.f_constant_pad_nd(&pad)?;
        for (d, filter) in filtering.filters.iter().enumerate() {
            tiles = tiles.f_unfold(2 + d as i64, filter.inputs as i64, filter.outputs as i64)?;
        }
        let tiles = taps_first(&tiles, dims)?;
        let rows = tiles.f_reshape([filtering.input.columns() as i64, -1])?;
        Ok(filtering
            .input
            .apply(&rows)?
            .f_reshape([self.products(), samples, -1])?)
    }

    /// An output in the order in which [`output`](Self::output) gives it: `[outputs, samples, tiles * out]`,
    /// zeros where a tile reaches beyond the places.
    pub fn arranged_output(&self, output: &Tensor) -> Result<Tensor> {
        let samples = output.size()[0];
        if !self.is_filtering() {
            let rows = self.map.output_rows(output)?;
            return Ok(rows.f_reshape([1, samples, -1])?);
        }
        let dims = self.places.len();
        let pad: Vec<i64> = (0..dims).rev().flat_map(|d| [0, self.beyond(d)]).collect();
        let mut tiles = output.f_constant_pad_nd(&pad)?;
        for d in 0..dims {
            let outputs = self.outputs_along(d);
            tiles = tiles.f_unfold(2 + d as i64, outputs, outputs)?;
        }
        Ok(taps_first(&tiles, dims)?.f_reshape([self.outputs(), samples, -1])?)
    }

    /// The weight's matrices, `[products, out, K]`, of a weight in its [order](Self::weight_order).
    pub fn kernels(&self, weight: &Tensor, reused: &mut Reused) -> Result<Tensor> {
        let Some(filtering) = &self.filtering else {
            return self.map.matrix(weight);
        };
        let taps = weight.f_reshape([filtering.kernel.columns() as i64, -1])?;
        let size = [self.products(), self.out_channels(), self.depth()];
        let kernels = reused.take(&size, weight)?;
        filtering.kernel.apply_into(&taps, &kernels)?;
        Ok(kernels)
    }

    /// From the products `[products, samples * tiles, out]` to the output, `[outputs * samples * tiles, out]`.
    pub fn output(&self, products: &Tensor, reused: &mut Reused) -> Result<Tensor> {
        let (size, out) = (products.size(), self.out_channels());
        Ok(match &self.filtering {
            None => products.f_view([-1, out])?,
            Some(filtering) => {
                let output = reused.take(&[self.outputs() * size[1], out], products)?;
                filtering.output.apply_into(products, &output)?;
                output
            }
        })
    }

    /// The gradient with respect to the products, for that with respect to the [`output`](Self::output) of so
    /// many samples. Overwrites what `grad` has beyond the places with zeros.
    pub fn products_gradient(
        &self,
        grad: &Tensor,
        samples: i64,
        reused: &mut Reused,
    ) -> Result<Tensor> {
        let out = self.out_channels();
        let Some(filtering) = &self.filtering else {
            return Ok(grad.f_reshape([1, -1, out])?);
        };
        let dims = self.places.len();
        let mut size: Vec<i64> = (0..dims).map(|d| self.outputs_along(d)).collect();
        size.push(samples);
        size.extend((0..dims).map(|d| self.tiles_along(d)));
        size.push(out);
        let by_place = grad.f_view(&size[..])?;
        for d in (0..dims).filter(|&d| self.beyond(d) > 0) {
            let (outputs, beyond) = (self.outputs_along(d), self.beyond(d));
            let _ = by_place
                .f_select((dims + 1 + d) as i64, self.tiles_along(d) - 1)?
                .f_narrow(d as i64, outputs - beyond, beyond)?
                .f_zero_()?;
        }
        let rows = samples * self.tiles();
        let products = reused.take(&[self.products(), rows, out], grad)?;
        let grad = grad.f_view([self.outputs(), -1])?;
        filtering.output_transposed.apply_into(&grad, &products)?;
        Ok(products)
    }

    /// The weight's gradient in its [order](Self::weight_order), for that of its [`kernels`](Self::kernels).
    pub fn weight_gradient(&self, grad: &Tensor, reused: &mut Reused) -> Result<Tensor> {
        let Some(filtering) = &self.filtering else {
            return self.map.from_matrix(grad, &self.weight_size);
        };
        let size: Vec<i64> = self
            .weight_order()
            .iter()
            .map(|&d| self.weight_size[d as usize])
            .collect();
        let weight = reused.take(&size, grad)?;
        filtering.kernel_transposed.apply_into(grad, &weight)?;
        Ok(weight)
    }
}

/// Memory that one step after the other writes the same kind of tensor to. Freed and allocated anew, large ones
/// would cost a page fault for each page.
#[derive(Debug, Default)]
pub struct Reused(Option<Tensor>);

impl Reused {
    /// A tensor of a size, and the type and device of another, with anything in it: the last one if it is like that.
    ///
    /// # Errors
    /// What torch refuses.
    pub fn take(&mut self, size: &[i64], like: &Tensor) -> Result<Tensor> {
        let options = (like.kind(), like.device());
        let fits = |t: &&Tensor| t.size() == size && (t.kind(), t.device()) == options;
        if let Some(tensor) = self.0.as_ref().filter(fits) {
            return Ok(tensor.shallow_clone());
        }
        // The old memory goes before the new one comes.
        self.0 = None;
        let tensor = Tensor::f_empty(size, options)?;
        Ok(self.0.insert(tensor).shallow_clone())
    }
}

/// `[samples, channels, tiles.., taps..] -> [taps.., samples, tiles.., channels]`
fn taps_first(tiles: &Tensor, dims: usize) -> Result<Tensor> {
    let dims = dims as i64;
    let order: Vec<i64> = (2 + dims..2 + 2 * dims)
        .chain([0])
        .chain(2..2 + dims)
        .chain([1])
        .collect();
    Ok(tiles.f_permute(&order)?)
}

/// Multiply-adds of output and weight gradient of a layer as torch computes them, for so many rows of outputs; with
/// what a convolution takes for bringing the weight into an order of its own, and its gradient back.
pub fn layer_operations(map: &LinearMap, weight: &Tensor, rows: f64) -> f64 {
    let elements = weight.numel() as f64;
    let moved = match map {
        LinearMap::Linear => 2.0 * elements,
        LinearMap::Convolution { .. } => 6.0 * elements,
    };
    2.0 * rows * elements + OPERATIONS_PER_ELEMENT * moved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Convolution;
    use tch::{Device, Kind};

    fn convolution(padding: &[i64], pad: Option<(Vec<i64>, String)>) -> LinearMap {
        let dims = padding.len();
        LinearMap::Convolution {
            convolution: Convolution {
                stride: vec![1; dims],
                padding: padding.to_vec(),
                dilation: vec![1; dims],
                output_padding: vec![0; dims],
                transposed: false,
                groups: 1,
            },
            pad,
        }
    }

    /// Output and weight gradient by matrix products are those of the layer.
    fn check(map: &LinearMap, products: &MatrixProducts<'_>, input: &Tensor, weight: &Tensor) {
        let context = format!("{products:?}");
        let input = map.padded(input).unwrap();
        let samples = input.size()[0];
        let expected = map.forward(&input, weight, None).unwrap();
        let arranged = weight.permute(products.weight_order()).contiguous();

        let inputs = products.inputs(&input, weight).unwrap();
        let count = products.products();
        let rows = inputs.reshape([count, samples * products.tiles(), -1]);
        let mut reused = Reused::default();
        let kernels = products.kernels(&arranged, &mut reused).unwrap();
        let output = products
            .output(&rows.bmm(&kernels.transpose(1, 2)), &mut reused)
            .unwrap();
        let target = products.arranged_output(&expected).unwrap();
        assert_eq!(target.size()[..2], [products.outputs(), samples]);
        // Beyond the places there are values in one and zeros in the other.
        let within = products.arranged_output(&expected.ones_like()).unwrap();
        let output = output.reshape_as(&target) * &within;
        assert!(output.allclose(&target, 1e-10, 1e-10, false), "{context}");

        let grad = expected.randn_like();
        let beyond = (within - 1.0) * 7.0;
        let arranged_grad = products.arranged_output(&grad).unwrap() + beyond;
        let of_products = products
            .products_gradient(&arranged_grad.contiguous(), samples, &mut reused)
            .unwrap();
        let found = products
            .weight_gradient(&of_products.transpose(1, 2).bmm(&rows), &mut reused)
            .unwrap();
        let expected = map.weight_gradient(&grad, &input, weight).unwrap();
        let expected = expected.permute(products.weight_order());
        assert!(found.allclose(&expected, 1e-10, 1e-10, false), "{context}");
    }

    #[test]
    fn minimal_filtering_is_the_convolution() {
        tch::manual_seed(0);
        let options = (Kind::Double, Device::Cpu);
        let reflect = Some((vec![1, 1, 1, 1], "reflect".to_owned()));
        let cases: [(LinearMap, &[i64]); 10] = [
            (convolution(&[0], None), &[9]),
            (convolution(&[1], None), &[2]),
            (convolution(&[1, 1], None), &[6, 8]),
            (convolution(&[2, 1], None), &[7, 11]),
            // An odd number of places, padding of all kinds.
            (convolution(&[0, 2], None), &[5, 6]),
            (convolution(&[1, 1], reflect), &[4, 2]),
            // The whole dimension in one tile; in both; a place alone.
            (convolution(&[1, 1], None), &[2, 5]),
            (convolution(&[1, 1], None), &[2, 2]),
            (convolution(&[1, 0], None), &[1, 3]),
            (convolution(&[1, 0, 1], None), &[2, 5, 3]),
        ];
        for (map, size) in cases {
            let mut shape = vec![3, 4];
            shape.extend(size);
            let input = Tensor::randn(&shape, options);
            let mut kernel = vec![5, 4];
            kernel.extend(vec![3; size.len()]);
            let weight = Tensor::randn(&kernel, options);
            let padded = map.padded(&input).unwrap();
            let places = map.forward(&padded, &weight, None).unwrap().size()[2..].to_vec();
            let ways = MatrixProducts::filtering(&map, &weight, &places).unwrap();
            // Six products in each of three dimensions are too many.
            assert_eq!(ways.len(), if size.len() < 3 { 2 } else { 1 });
            for products in ways {
                check(&map, &products, &input, &weight);
            }
        }
    }

    /// Root mean square of the error, divided by that of what is exact.
    fn relative_error(found: &Tensor, exact: &Tensor) -> f64 {
        let norm = |x: &Tensor| x.square().mean(Kind::Double).double_value(&[]).sqrt();
        norm(&(found - exact)) / norm(exact)
    }

    /// The documented errors of float32, for inputs as they come behind normalizations, with a large mean, and of
    /// very different sizes.
    #[test]
    fn minimal_filtering_is_about_as_exact_as_torchs_convolution() {
        tch::manual_seed(0);
        let options = (Kind::Double, Device::Cpu);
        let map = convolution(&[1, 1], None);
        let weight = Tensor::randn([64, 64, 3, 3], options);
        let normal = Tensor::randn([16, 64, 8, 8], options);
        let (offset, skewed) = (&normal + 100.0, (&normal * 2.0).exp());
        // F(2, 3), F(4, 3). At the usual points the latter's are twice as large.
        let limits = [[4e-7, 6e-7], [1.4e-6, 1.4e-6]];
        for input in [normal, offset, skewed] {
            let output = map.forward(&input, &weight, None).unwrap();
            let grad = output.randn_like();
            let weight_gradient = map.weight_gradient(&grad, &input, &weight).unwrap();
            let single = |x: &Tensor| x.to_kind(Kind::Float);
            let (x, w, g) = (single(&input), single(&weight), single(&grad));
            let places = &output.size()[2..];
            let ways = MatrixProducts::filtering(&map, &w, places).unwrap();
            let torchs = [
                relative_error(&map.forward(&x, &w, None).unwrap(), &output),
                relative_error(&map.weight_gradient(&g, &x, &w).unwrap(), &weight_gradient),
            ];
            for (products, limits) in ways.iter().zip(limits) {
                let rows = products.inputs(&x, &w).unwrap();
                let rows = rows.reshape([products.products(), 16 * products.tiles(), -1]);
                let arranged = w.permute(products.weight_order()).contiguous();
                let mut reused: [Reused; 4] = Default::default();
                let kernels = products.kernels(&arranged, &mut reused[0]).unwrap();
                let found = products
                    .output(&rows.bmm(&kernels.transpose(1, 2)), &mut reused[1])
                    .unwrap();
                // Whole tiles: nothing is beyond the places.
                let expected = products.arranged_output(&output).unwrap();
                let of_output = relative_error(&found.reshape_as(&expected), &expected);
                let grads = products.arranged_output(&g).unwrap().contiguous();
                let grads = products
                    .products_gradient(&grads, 16, &mut reused[2])
                    .unwrap();
                let found = products
                    .weight_gradient(&grads.transpose(1, 2).bmm(&rows), &mut reused[3])
                    .unwrap();
                let expected = weight_gradient.permute(products.weight_order());
                let errors = [of_output, relative_error(&found, &expected)];
                assert!(
                    errors
                        .iter()
                        .zip(limits)
                        .all(|(error, limit)| *error < limit),
                    "{errors:?}, torch's {torchs:?}"
                );
            }
        }
    }

    #[test]
    fn rows_are_any_convolution_without_groups() {
        tch::manual_seed(0);
        let options = (Kind::Double, Device::Cpu);
        for transposed in [false, true] {
            let LinearMap::Convolution {
                mut convolution, ..
            } = convolution(&[1, 1], None)
            else {
                unreachable!("it is a convolution")
            };
            convolution.stride = vec![2, 1];
            convolution.transposed = transposed;
            let map = LinearMap::Convolution {
                convolution,
                pad: None,
            };
            let input = Tensor::randn([3, 4, 6, 5], options);
            let size = if transposed {
                [4, 5, 3, 2]
            } else {
                [5, 4, 3, 2]
            };
            let weight = Tensor::randn(size, options);
            let places = map.forward(&input, &weight, None).unwrap().size()[2..].to_vec();
            let products = MatrixProducts::rows(&map, &weight, &places).unwrap();
            check(&map, &products, &input, &weight);
            assert!(
                !transposed
                    || MatrixProducts::filtering(&map, &weight, &places)
                        .unwrap()
                        .is_empty()
            );
        }
        let weight = Tensor::randn([6, 4], options);
        assert!(MatrixProducts::rows(&LinearMap::Linear, &weight, &[]).is_none());
    }

    /// As timed layer by layer in ResNet-18 with 64x64 inputs (32 samples; two cores, AVX-512).
    #[test]
    fn operations_order_the_forms_as_their_times_do() {
        let options = (Kind::Float, Device::Cpu);
        let map = convolution(&[1, 1], None);
        for (channels, length, fastest) in [
            (2, 16, "layer"),
            (16, 16, "filtering"),
            (64, 16, "filtering"),
            (128, 8, "filtering"),
            (256, 4, "filtering"),
            (512, 2, "filtering"),
            (512, 1, "rows"),
        ] {
            let weight = Tensor::zeros([channels, channels, 3, 3], options);
            let places = [length, length];
            let rows = MatrixProducts::rows(&map, &weight, &places).unwrap();
            let layer = layer_operations(&map, &weight, (32 * length * length) as f64);
            let mut forms = vec![(rows.operations(32), "rows"), (layer, "layer")];
            for products in MatrixProducts::filtering(&map, &weight, &places).unwrap() {
                forms.push((products.operations(32), "filtering"));
            }
            forms.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert_eq!(forms[0].1, fastest, "{channels}: {forms:?}");
        }
    }
}
