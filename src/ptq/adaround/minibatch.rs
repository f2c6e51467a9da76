//! The loss's gradient for samples that are drawn anew for each step.

use super::{Activation, BatchShape, Layer, Pulse, BATCH_SIZE};
use crate::error::Result;
use crate::ops::reconstruction_gradient;
use crate::ptq::matrix_products::{MatrixProducts, Reused};
use crate::ptq::random::Random;
use tch::{Kind, Tensor};

/// Draws samples and computes their loss's gradient.
pub(super) struct Minibatch<'a> {
    sampler: Sampler,
    /// `None`: through the layer.
    products: Option<MatrixProducts<'a>>,
    /// For the products, where memory allows.
    prepared: Option<Prepared>,
    buffers: Buffers,
}

/// Inputs and targets of all samples, as matrix products take and give them.
struct Prepared {
    /// `[products, samples, ..]`
    inputs: Tensor,
    /// `[outputs * samples, ..]`
    targets: Tensor,
    /// Places of the batches' first samples.
    begins: Vec<i64>,
}

/// What steps write to in turns.
#[derive(Debug, Default)]
struct Buffers {
    inputs: Reused,
    /// Those of the weight, then their gradients; of a filtered one.
    kernels: Reused,
    /// And their gradients.
    products: Reused,
    outputs: Reused,
    weight: Reused,
}

/// Samples of a step beside their targets.
struct Part {
    /// With samples in front, also others.
    target: Tensor,
    /// Places of the step's in it.
    samples: Tensor,
    /// The place of the first among all of the step.
    begin: i64,
    len: i64,
}

impl Part {
    fn drawn(&self) -> Result<Tensor> {
        Ok(self.target.f_index_select(0, &self.samples)?)
    }
}

impl<'a> Minibatch<'a> {
    /// Steps through the layer.
    pub(super) fn of_layer(batches: Vec<BatchShape>, seed: u64) -> Self {
        Self {
            sampler: Sampler::new(batches, seed),
            products: None,
            prepared: None,
            buffers: Buffers::default(),
        }
    }

    /// Steps as matrix products; all samples are of one shape.
    pub(super) fn of_products(
        layer: &Layer<'_>,
        batches: Vec<BatchShape>,
        products: MatrixProducts<'a>,
        seed: u64,
        pulse: &mut Pulse<'_, '_>,
    ) -> Result<Self> {
        Ok(Self {
            prepared: Prepared::new(layer, &batches, &products, pulse)?,
            sampler: Sampler::new(batches, seed),
            products: Some(products),
            buffers: Buffers::default(),
        })
    }

    /// The gradient of a step's loss with respect to the soft-rounded weight, in its order.
    pub(super) fn gradient(&mut self, layer: &Layer<'_>, rounded: &Tensor) -> Result<Tensor> {
        let samples = self.sampler.draw();
        let buffers = &mut self.buffers;
        let Some(products) = &self.products else {
            return gradient_of_layer(layer, rounded, &samples, buffers);
        };
        let (inputs, targets) = match &self.prepared {
            Some(prepared) => prepared.draw(&samples, products, buffers)?,
            None => prepare(layer, &samples, products, buffers)?,
        };
        gradient_of_products(layer, rounded, products, &inputs, targets, buffers)
    }
}

impl Prepared {
    /// `None` if it takes more than the layer's memory.
    fn new(
        layer: &Layer<'_>,
        batches: &[BatchShape],
        products: &MatrixProducts<'_>,
        pulse: &mut Pulse<'_, '_>,
    ) -> Result<Option<Self>> {
        let samples: i64 = batches.iter().map(|b| b.samples as i64).sum();
        let largest = batches.iter().map(|b| b.samples as i64).max().unwrap_or(0);
        let elements = products.elements(samples, largest.max(samples.min(BATCH_SIZE as i64)));
        let bytes = elements as u64 * layer.kind.elt_size_in_bytes() as u64;
        if bytes > layer.problem.memory {
            return Ok(None);
        }
        let mut begins = vec![];
        let mut begin = 0;
        let mut whole: Option<(Tensor, Tensor)> = None;
        for (index, batch) in batches.iter().enumerate() {
            pulse.beat()?;
            let parts = (
                products.inputs(&layer.input(index)?, layer.weight)?,
                products.arranged_output(&layer.target(index)?)?,
            );
            let of_all = |part: &Tensor| -> Result<Tensor> {
                let size = part.size();
                let options = (part.kind(), part.device());
                Ok(Tensor::f_empty([size[0], samples, size[2]], options)?)
            };
            let (inputs, targets) = match &mut whole {
                Some(whole) => whole,
                None => whole.insert((of_all(&parts.0)?, of_all(&parts.1)?)),
            };
            let len = batch.samples as i64;
            inputs.f_narrow(1, begin, len)?.f_copy_(&parts.0)?;
            targets.f_narrow(1, begin, len)?.f_copy_(&parts.1)?;
            begins.push(begin);
            begin += len;
        }
        whole
            .map(|(inputs, targets)| {
                Ok(Self {
                    inputs,
                    targets: targets.f_flatten(0, 1)?,
                    begins,
                })
            })
            .transpose()
    }

    /// Inputs and targets of some samples, given as (batch, place in it).
    fn draw(
        &self,
        samples: &[(usize, i64)],
        products: &MatrixProducts<'_>,
        buffers: &mut Buffers,
    ) -> Result<(Tensor, Part)> {
        let places: Vec<i64> = samples
            .iter()
            .map(|&(batch, place)| self.begins[batch] + place)
            .collect();
        let size = self.inputs.size();
        let inputs = buffers
            .inputs
            .take(&[size[0], places.len() as i64, size[2]], &self.inputs)?;
        let _ = self
            .inputs
            .f_index_select_out(&inputs, 1, &Tensor::from_slice(&places))?;
        let whole = size[1];
        let of_outputs: Vec<i64> = (0..products.outputs())
            .flat_map(|output| places.iter().map(move |place| output * whole + place))
            .collect();
        let targets = Part {
            target: self.targets.shallow_clone(),
            samples: Tensor::from_slice(&of_outputs),
            begin: 0,
            len: of_outputs.len() as i64,
        };
        Ok((inputs, targets))
    }
}

/// What [`Prepared::draw`] gives, made of the samples alone.
fn prepare(
    layer: &Layer<'_>,
    samples: &[(usize, i64)],
    products: &MatrixProducts<'_>,
    buffers: &mut Buffers,
) -> Result<(Tensor, Part)> {
    let (input, parts) = drawn(layer, samples, buffers)?;
    let inputs = products.inputs(&layer.padded(&input)?, layer.weight)?;
    let targets: Vec<Tensor> = parts.iter().map(Part::drawn).collect::<Result<_>>()?;
    let target = Tensor::f_cat(&targets, 0)?.f_to_kind(layer.kind)?;
    let target = products.arranged_output(&target)?.f_flatten(0, 1)?;
    let len = target.size()[0];
    let targets = Part {
        samples: Tensor::f_arange(len, (Kind::Int64, target.device()))?,
        target: target.f_contiguous()?,
        begin: 0,
        len,
    };
    Ok((inputs, targets))
}

/// Inputs of some samples, copied out of their batches, and where their targets are.
fn drawn(
    layer: &Layer<'_>,
    samples: &[(usize, i64)],
    buffers: &mut Buffers,
) -> Result<(Tensor, Vec<Part>)> {
    let mut begin = 0;
    let mut inputs = vec![];
    let mut parts = vec![];
    for run in samples.chunk_by(|a, b| a.0 == b.0) {
        let places: Vec<i64> = run.iter().map(|s| s.1).collect();
        let part = Part {
            target: layer.raw_target(run[0].0)?,
            samples: Tensor::from_slice(&places).f_to_device(layer.weight.device())?,
            begin,
            len: places.len() as i64,
        };
        begin += part.len;
        inputs.push(layer.raw_input(run[0].0)?);
        parts.push(part);
    }
    // The batches themselves stay where they are.
    let mut size = inputs[0].size();
    size[0] = begin;
    let one_kind = inputs.iter().all(|batch| batch.kind() == inputs[0].kind());
    let like = if one_kind { &inputs[0] } else { layer.weight };
    let input = buffers.inputs.take(&size, like)?;
    for (batch, part) in inputs.iter().zip(&parts) {
        let mut place = input.f_narrow(0, part.begin, part.len)?;
        if one_kind {
            let _ = batch.f_index_select_out(&place, 0, &part.samples)?;
        } else {
            place.f_copy_(&batch.f_index_select(0, &part.samples)?)?;
        }
    }
    Ok((input, parts))
}

fn gradient_of_layer(
    layer: &Layer<'_>,
    rounded: &Tensor,
    samples: &[(usize, i64)],
    buffers: &mut Buffers,
) -> Result<Tensor> {
    let map = layer.problem.map;
    let (input, parts) = drawn(layer, samples, buffers)?;
    let input = layer.padded(&input)?;
    let output = layer.forward(&input, rounded)?.f_contiguous()?;
    let grad = layer.output_gradient(&output, &parts, map.num_rows(&output))?;
    map.weight_gradient(&grad, &input, rounded)
}

/// For inputs of shape `[products, samples, ..]` and targets of as many samples for each output of a tile.
fn gradient_of_products(
    layer: &Layer<'_>,
    rounded: &Tensor,
    products: &MatrixProducts<'_>,
    inputs: &Tensor,
    targets: Part,
    buffers: &mut Buffers,
) -> Result<Tensor> {
    let (count, samples) = (inputs.size()[0], inputs.size()[1]);
    let rows = inputs.f_view([count, samples * products.tiles(), -1])?;
    let kernels = products.kernels(rounded, &mut buffers.kernels)?;
    let size = [count, rows.size()[1], kernels.size()[1]];
    let of_rows = buffers.products.take(&size, &rows)?;
    let _ = rows.f_bmm_out(&of_rows, &kernels.f_transpose(1, 2)?)?;
    let mut output = products.output(&of_rows, &mut buffers.outputs)?;
    if let Some(bias) = layer.bias {
        let _ = output.f_add_(bias)?;
    }
    let grad = layer.output_gradient(&output, &[targets], samples * products.places())?;
    let grad = products.products_gradient(&grad, samples, &mut buffers.products)?;
    let of_kernels = buffers.kernels.take(&kernels.size(), &kernels)?;
    let _ = grad.f_transpose(1, 2)?.f_bmm_out(&of_kernels, &rows)?;
    products.weight_gradient(&of_kernels, &mut buffers.weight)
}

impl Layer<'_> {
    /// The gradient of a step's loss with respect to the output, which it may overwrite: samples first, with
    /// `rows` rows of output channels.
    fn output_gradient(&self, output: &Tensor, parts: &[Part], rows: i64) -> Result<Tensor> {
        let factor = 2.0 / rows.max(1) as f64;
        let activation = match self.problem.activation {
            None => return self.output_gradient_in_place(output, parts, factor, false),
            Some(Activation::Relu) => {
                return self.output_gradient_in_place(output, parts, factor, true)
            }
            Some(activation) => activation,
        };
        let targets: Vec<Tensor> = parts.iter().map(Part::drawn).collect::<Result<_>>()?;
        let target = Tensor::f_cat(&targets, 0)?.f_to_kind(self.kind)?;
        let target = activation.apply(&target.f_reshape_as(output)?)?;
        let activated = activation.apply(output)?;
        let grad = (&activated - target).f_mul_scalar(factor)?;
        Ok(activation
            .gradient(&grad, output, &activated)?
            .f_contiguous()?)
    }

    /// The same without copies of the targets.
    fn output_gradient_in_place(
        &self,
        output: &Tensor,
        parts: &[Part],
        factor: f64,
        relu: bool,
    ) -> Result<Tensor> {
        let samples: i64 = parts.iter().map(|part| part.len).sum();
        let by_sample = output.f_view([samples, -1])?;
        for part in parts {
            let mut place = by_sample.f_narrow(0, part.begin, part.len)?;
            if part.target.kind() == self.kind && part.target.is_contiguous() {
                let target = part.target.f_flatten(1, -1)?;
                reconstruction_gradient(&mut place, &target, Some(&part.samples), factor, relu)?;
            } else {
                let target = part.drawn()?.f_to_kind(self.kind)?.f_flatten(1, -1)?;
                reconstruction_gradient(&mut place, &target, None, factor, relu)?;
            }
        }
        Ok(output.shallow_clone())
    }
}

/// Draws the samples of the steps.
struct Sampler {
    batches: Vec<BatchShape>,
    /// Batches whose samples can be stacked, by shape; the number of samples in each.
    stacks: Vec<(Vec<usize>, usize)>,
    random: Random,
}

impl Sampler {
    fn new(batches: Vec<BatchShape>, seed: u64) -> Self {
        let mut stacks: Vec<(Vec<usize>, usize)> = vec![];
        for (index, batch) in batches.iter().enumerate() {
            let stack = stacks
                .iter_mut()
                .find(|(members, _)| batches[members[0]].shape == batch.shape);
            match stack {
                Some((members, samples)) => {
                    members.push(index);
                    *samples += batch.samples;
                }
                None => stacks.push((vec![index], batch.samples)),
            }
        }
        Self {
            batches,
            stacks,
            random: Random::new(seed),
        }
    }

    /// Samples of one step, as (batch, place within it), in the order of the data. Where shapes differ
    /// between batches, all are of one shape, chosen as often as it has samples.
    fn draw(&mut self) -> Vec<(usize, i64)> {
        let total: usize = self.stacks.iter().map(|s| s.1).sum();
        let mut place = self.random.below(total as u64) as usize;
        let mut stack = 0;
        while place >= self.stacks[stack].1 {
            place -= self.stacks[stack].1;
            stack += 1;
        }
        let (members, samples) = &self.stacks[stack];
        let mut chosen = self.random.sample(*samples, BATCH_SIZE.min(*samples));
        chosen.sort_unstable();
        let mut found = Vec::with_capacity(chosen.len());
        let (mut member, mut begin) = (0, 0);
        for index in chosen {
            while index - begin >= self.batches[members[member]].samples {
                begin += self.batches[members[member]].samples;
                member += 1;
            }
            found.push((members[member], (index - begin) as i64));
        }
        found
    }
}
