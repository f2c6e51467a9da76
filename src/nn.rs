//! Quantizers and quantized layers for programs written with [`tch`], no Python needed.
//!
//! A [`Quantizer`] is observed with data and then simulates its integer grid; its range (`min`, `max`)
//! is a variable of the [`nn::VarStore`](tch::nn::VarStore), so optimizers train it along with the
//! weights. [`Linear`] and [`Conv2D`] hold a quantizer for their weight and one for their output.

use crate::calibration::min_max::fit_range_min_max;
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::ops;
use tch::nn::{self, Module};
use tch::{Kind, Tensor};

/// What a quantizer's grid is like, and how its encodings lie over a tensor.
#[derive(Clone, Debug)]
pub struct QuantizerConfig {
    /// The integer grid.
    pub grid: AffineGrid,
    /// Whether the range is symmetric around zero (weights) or as observed (activations).
    pub symmetric: bool,
    /// Shape of the encodings: `[]` per tensor, `[out_channels, 1, 1, 1]` per channel of a convolution.
    pub shape: Vec<i64>,
    /// Elements of one block, per dimension of `shape`; `None`: `shape` broadcasts.
    pub block_size: Option<Vec<i64>>,
}

impl QuantizerConfig {
    /// Per tensor, asymmetric, unsigned: the usual for activations.
    ///
    /// # Errors
    /// [`Error::Value`] for a bit-width outside 1..=32.
    pub fn activation(bitwidth: u32) -> Result<Self> {
        Ok(Self {
            grid: AffineGrid::from_bitwidth(bitwidth, false)?,
            symmetric: false,
            shape: vec![],
            block_size: None,
        })
    }

    /// Per output channel (dimension 0), symmetric, signed: the usual for weights of this shape.
    ///
    /// # Errors
    /// [`Error::Value`] for a bit-width outside 1..=32.
    pub fn weight(bitwidth: u32, weight_shape: &[i64]) -> Result<Self> {
        let mut shape = vec![1; weight_shape.len()];
        if let (Some(first), Some(&channels)) = (shape.first_mut(), weight_shape.first()) {
            *first = channels;
        }
        Ok(Self {
            grid: AffineGrid::from_bitwidth(bitwidth, true)?,
            symmetric: true,
            shape,
            block_size: None,
        })
    }
}

/// Simulates an affine integer grid: quantize-dequantize with a range that is observed, then trained.
#[derive(Debug)]
pub struct Quantizer {
    config: QuantizerConfig,
    name: String,
    min: Tensor,
    max: Tensor,
    observed: Option<(Tensor, Tensor)>,
    initialized: bool,
}

impl Quantizer {
    /// A quantizer whose range is kept in `path` as `min` and `max`. It must be calibrated
    /// ([`observe`](Self::observe) and [`calibrate`](Self::calibrate)) before [`forward`](Self::forward).
    pub fn new(path: &nn::Path, config: QuantizerConfig) -> Self {
        let min = path.var("min", &config.shape, nn::Init::Const(0.0));
        let max = path.var("max", &config.shape, nn::Init::Const(0.0));
        Self {
            config,
            name: path.components().collect::<Vec<_>>().join("."),
            min,
            max,
            observed: None,
            initialized: false,
        }
    }

    /// The configuration given at construction.
    pub fn config(&self) -> &QuantizerConfig {
        &self.config
    }

    /// The range, of shape `config().shape`: `(min, max)`.
    pub fn range(&self) -> (&Tensor, &Tensor) {
        (&self.min, &self.max)
    }

    /// Takes the smallest and largest elements of `x` into the running statistics.
    ///
    /// # Errors
    /// [`Error::Value`] if `x` is empty or does not fit the encodings' shape.
    pub fn observe(&mut self, x: &Tensor) -> Result<()> {
        let (low, high) = tch::no_grad(|| {
            ops::min_max(x, &self.config.shape, self.config.block_size.as_deref())
        })?;
        self.observed = Some(match self.observed.take() {
            None => (low, high),
            Some((old_low, old_high)) => (old_low.minimum(&low), old_high.maximum(&high)),
        });
        Ok(())
    }

    /// Sets the range from everything observed so far, and forgets the statistics.
    ///
    /// # Errors
    /// [`Error::State`] if nothing was observed.
    pub fn calibrate(&mut self) -> Result<()> {
        let Some((low, high)) = self.observed.take() else {
            return Err(Error::State(format!(
                "quantizer {}: calibrate() before any data was observed; call observe() first",
                self.name
            )));
        };
        let low = Vec::<f32>::try_from(low.to_kind(Kind::Float).flatten(0, -1))?;
        let high = Vec::<f32>::try_from(high.to_kind(Kind::Float).flatten(0, -1))?;
        let steps = self.config.grid.num_steps() as f64;
        let fitted = low
            .iter()
            .zip(&high)
            .map(|(&l, &h)| fit_range_min_max(l, h, steps, self.config.symmetric))
            .collect::<Result<Vec<_>>>()?;
        let (low, high): (Vec<f32>, Vec<f32>) = fitted.into_iter().unzip();
        tch::no_grad(|| {
            let shape = &self.config.shape;
            self.min.copy_(&Tensor::from_slice(&low).reshape(shape));
            self.max.copy_(&Tensor::from_slice(&high).reshape(shape));
        });
        self.initialized = true;
        Ok(())
    }

    /// Says that the range is set, for one that was loaded from a file into the `VarStore`.
    pub fn mark_initialized(&mut self) {
        self.initialized = true;
    }

    /// `x` on the grid, in its own dtype. Differentiable in `x` and in the range.
    ///
    /// # Errors
    /// [`Error::State`] before calibration; [`Error::Value`] for an `x` that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !self.initialized {
            return Err(Error::State(format!(
                "quantizer {}: forward() before calibration; call observe() with data, then calibrate()",
                self.name
            )));
        }
        ops::quantize_dequantize_range(
            x,
            &self.min,
            &self.max,
            &self.config.grid,
            self.config.symmetric,
            self.config.block_size.as_deref(),
        )
    }
}

/// How a quantized layer behaves in `forward`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// Weight and output are quantized.
    #[default]
    Simulate,
    /// The output is observed and passed through.
    Observe,
}

macro_rules! quantized_layer {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            layer: $inner,
            weight_quantizer: Quantizer,
            output_quantizer: Quantizer,
            mode: Mode,
        }

        impl $name {
            /// Wraps a layer: `weight_bits` per output channel, `output_bits` per tensor. The ranges are
            /// variables of `path`. The weight's range is observed at once.
            ///
            /// # Errors
            /// [`Error::Value`] for bit-widths outside 1..=32.
            pub fn new(
                path: &nn::Path,
                layer: impl Into<$inner>,
                weight_bits: u32,
                output_bits: u32,
            ) -> Result<Self> {
                let layer = layer.into();
                let config = QuantizerConfig::weight(weight_bits, &layer.ws.size())?;
                let mut weight_quantizer = Quantizer::new(&(path / "weight_quantizer"), config);
                weight_quantizer.observe(&layer.ws)?;
                weight_quantizer.calibrate()?;
                let config = QuantizerConfig::activation(output_bits)?;
                let output_quantizer = Quantizer::new(&(path / "output_quantizer"), config);
                Ok(Self {
                    layer,
                    weight_quantizer,
                    output_quantizer,
                    mode: Mode::default(),
                })
            }

            /// Runs the layer with its quantized weight on calibration data and observes the output;
            /// answers the output, unquantized. Finish with [`calibrate`](Self::calibrate).
            pub fn observe(&mut self, x: &Tensor) -> Result<Tensor> {
                self.mode = Mode::Observe;
                let output = tch::no_grad(|| self.try_forward(x))?;
                self.mode = Mode::Simulate;
                self.output_quantizer.observe(&output)?;
                Ok(output)
            }

            /// Sets the output's range from what was observed.
            ///
            /// # Errors
            /// [`Error::State`] if nothing was observed.
            pub fn calibrate(&mut self) -> Result<()> {
                self.output_quantizer.calibrate()
            }

            /// The quantizers of weight and output.
            pub fn quantizers(&self) -> (&Quantizer, &Quantizer) {
                (&self.weight_quantizer, &self.output_quantizer)
            }

            /// The wrapped layer.
            pub fn layer(&self) -> &$inner {
                &self.layer
            }

            /// The layer's output with quantized weight, quantized.
            ///
            /// # Errors
            /// [`Error::State`] before calibration.
            pub fn try_forward(&self, x: &Tensor) -> Result<Tensor> {
                let weight = self.weight_quantizer.forward(&self.layer.ws)?;
                let output = Self::apply(&self.layer, x, &weight)?;
                match self.mode {
                    Mode::Observe => Ok(output),
                    Mode::Simulate => self.output_quantizer.forward(&output),
                }
            }
        }

        /// As [`try_forward`](Self::try_forward).
        ///
        /// # Panics
        /// Where `try_forward` gives an error: `tch`'s trait has no other way.
        impl Module for $name {
            fn forward(&self, x: &Tensor) -> Tensor {
                self.try_forward(x).unwrap_or_else(|e| panic!("{e}"))
            }
        }
    };
}

quantized_layer!(
    /// A linear layer with quantized weight and output.
    Linear,
    nn::Linear
);
quantized_layer!(
    /// A two-dimensional convolution with quantized weight and output. Made of a trained layer and the
    /// configuration it was made with (which `tch` keeps to itself): `Conv2D::new(path, (layer, config),
    /// 8, 8)`.
    Conv2D,
    Convolution
);

/// A `tch` convolution together with its configuration.
#[derive(Debug)]
pub struct Convolution {
    /// Weight `[out_channels, in_channels / groups, kh, kw]`.
    pub ws: Tensor,
    /// Bias `[out_channels]`.
    pub bs: Option<Tensor>,
    /// Stride, padding, dilation, groups.
    pub config: nn::ConvConfig,
}

impl From<(nn::Conv2D, nn::ConvConfig)> for Convolution {
    fn from((layer, config): (nn::Conv2D, nn::ConvConfig)) -> Self {
        Self {
            ws: layer.ws,
            bs: layer.bs,
            config,
        }
    }
}

impl Linear {
    fn apply(layer: &nn::Linear, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(weight, layer.bs.as_ref())?)
    }
}

impl Conv2D {
    fn apply(layer: &Convolution, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let config = &layer.config;
        if !matches!(config.padding_mode, nn::PaddingMode::Zeros) {
            return Err(Error::value(
                "layer",
                "a convolution with padding of zeros",
                format!("{:?}", config.padding_mode),
            ));
        }
        Ok(x.f_conv2d(
            weight,
            layer.bs.as_ref(),
            [config.stride; 2],
            [config.padding; 2],
            [config.dilation; 2],
            config.groups,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::OptimizerConfig;
    use tch::Device;

    #[test]
    fn an_uncalibrated_quantizer_says_so_by_name() {
        let store = nn::VarStore::new(Device::Cpu);
        let config = QuantizerConfig::activation(8).unwrap();
        let mut quantizer = Quantizer::new(&(store.root() / "block" / "out"), config);
        let x = Tensor::rand([3], (Kind::Float, Device::Cpu));
        let message = quantizer.forward(&x).unwrap_err().to_string();
        assert!(
            message.contains("block.out") && message.contains("calibrate"),
            "{message}"
        );
        assert!(quantizer.calibrate().is_err());
        let empty = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        assert!(matches!(
            quantizer.observe(&empty),
            Err(Error::Value { .. })
        ));
    }

    #[test]
    fn values_on_the_grid_stay_and_others_move_by_half_a_step_at_most() {
        let store = nn::VarStore::new(Device::Cpu);
        let mut quantizer = Quantizer::new(&store.root(), QuantizerConfig::activation(4).unwrap());
        let x = Tensor::from_slice(&[-1.0_f32, 0.0, 0.24, 0.5, 2.0]);
        quantizer.observe(&x).unwrap();
        quantizer.calibrate().unwrap();
        let y = quantizer.forward(&x).unwrap();
        let error = (&y - &x).abs().max().double_value(&[]);
        assert!(error <= 0.1 + 1e-6, "{error}");
        let again = quantizer.forward(&y).unwrap();
        assert_eq!(
            Vec::<f32>::try_from(&again).unwrap(),
            Vec::<f32>::try_from(&y).unwrap()
        );
        // 0 is exact.
        assert_eq!(y.double_value(&[1]), 0.0);
    }

    #[test]
    fn weights_and_ranges_learn() {
        tch::manual_seed(3);
        let store = nn::VarStore::new(Device::Cpu);
        let root = store.root();
        let layer = nn::linear(&root / "fc", 6, 3, Default::default());
        let mut layer = Linear::new(&(&root / "fc"), layer, 4, 8).unwrap();
        let x = Tensor::randn([64, 6], (Kind::Float, Device::Cpu));
        let target = x.narrow(1, 0, 3) * 0.7;
        let _ = layer.observe(&x).unwrap();
        layer.calibrate().unwrap();
        let mut optimizer = nn::Adam::default().build(&store, 1e-2).unwrap();
        let loss = |layer: &Linear| {
            (layer.try_forward(&x).unwrap() - &target)
                .square()
                .mean(Kind::Float)
        };
        let (before, range) = (
            loss(&layer).double_value(&[]),
            layer.quantizers().1.range().1.copy(),
        );
        for _ in 0..100 {
            optimizer.backward_step(&loss(&layer));
        }
        let after = loss(&layer).double_value(&[]);
        assert!(after < 0.2 * before, "{before} -> {after}");
        assert_ne!(range, *layer.quantizers().1.range().1);
    }

    #[test]
    fn a_convolution_is_the_layer_on_the_quantized_weight() {
        let store = nn::VarStore::new(Device::Cpu);
        let root = store.root();
        let config = nn::ConvConfig {
            padding: 1,
            stride: 2,
            groups: 2,
            ..Default::default()
        };
        let layer = nn::conv2d(&root / "conv", 4, 6, 3, config);
        let mut layer = Conv2D::new(&(&root / "conv"), (layer, config), 8, 8).unwrap();
        let x = Tensor::randn([2, 4, 9, 9], (Kind::Float, Device::Cpu));
        let plain = layer.observe(&x).unwrap();
        layer.calibrate().unwrap();
        let weight = layer.quantizers().0.forward(&layer.layer().ws).unwrap();
        let expected = x.conv2d(&weight, layer.layer().bs.as_ref(), [2], [1], [1], 2);
        assert_eq!(plain, expected);
        let y = layer.forward(&x);
        let step = (plain.max() - plain.min()).double_value(&[]) / 255.0;
        assert!((y - plain).abs().max().double_value(&[]) <= 0.51 * step);
    }
}
