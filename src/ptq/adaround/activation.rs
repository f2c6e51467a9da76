//! Activation functions behind a layer, with their derivatives.

use crate::error::Result;
use tch::Tensor;

/// An activation function, by the name it has in `torch.nn.functional`.
#[derive(Debug)]
pub enum Activation {
    Relu,
    /// `clamp(x, low, high)`: ReLU6, hardtanh.
    Clamp(f64, f64),
    LeakyRelu(f64),
    /// With its weights: one, or one for each channel (dimension 1).
    Prelu(Tensor),
    Elu(f64),
    /// `none` or `tanh`.
    Gelu(String),
    Silu,
    Mish,
    Hardswish,
    Hardsigmoid,
    Sigmoid,
    Tanh,
    /// `beta`, `threshold`.
    Softplus(f64, f64),
}

impl Activation {
    /// `f(x)`.
    ///
    /// # Errors
    /// What torch refuses, also below.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Relu => x.f_relu()?,
            Activation::Clamp(low, high) => x.f_clamp(*low, *high)?,
            // tch's leaky_relu has the default slope alone.
            Activation::LeakyRelu(slope) => x.f_relu()? - x.f_neg()?.f_relu()? * *slope,
            Activation::Prelu(weight) => x.f_prelu(&weight.f_to_kind(x.kind())?)?,
            Activation::Elu(alpha) => {
                let negative = x.f_clamp_max(0.0)?.f_expm1()? * *alpha;
                x.f_relu()? + negative
            }
            Activation::Gelu(approximate) => x.f_gelu(approximate)?,
            Activation::Silu => x.f_silu()?,
            Activation::Mish => x.f_mish()?,
            Activation::Hardswish => x.f_hardswish()?,
            Activation::Hardsigmoid => x.f_hardsigmoid()?,
            Activation::Sigmoid => x.f_sigmoid()?,
            Activation::Tanh => x.f_tanh()?,
            Activation::Softplus(beta, threshold) => {
                let scaled = x * *beta;
                let soft = scaled.f_clamp_max(*threshold)?.f_exp()?.f_log1p()? / *beta;
                let linear = scaled.f_gt(*threshold)?;
                x.f_where_self(&linear, &soft)?
            }
        })
    }

    /// `grad * f'(x)` for `y = f(x)`. Not by autograd, which torch has none of in inference mode.
    pub fn gradient(&self, grad: &Tensor, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Relu => x.f_threshold_backward(grad, 0.0)?,
            Activation::Clamp(low, high) => x.f_hardtanh_backward(grad, *low, *high)?,
            Activation::LeakyRelu(slope) => x.f_leaky_relu_backward(grad, *slope, false)?,
            Activation::Prelu(weight) => {
                let mut size = vec![1; x.dim()];
                if weight.numel() > 1 {
                    size[1] = weight.numel() as i64;
                }
                let slopes = weight.f_to_kind(x.kind())?.f_reshape(&size)?;
                grad.f_where_self(&x.f_gt(0.0)?, &(grad * slopes))?
            }
            Activation::Elu(alpha) => Tensor::f_elu_backward(grad, *alpha, 1.0, 1.0, false, x)?,
            Activation::Gelu(approximate) => x.f_gelu_backward(grad, approximate)?,
            Activation::Silu => x.f_silu_backward(grad)?,
            Activation::Mish => x.f_mish_backward(grad)?,
            Activation::Hardswish => x.f_hardswish_backward(grad)?,
            Activation::Hardsigmoid => x.f_hardsigmoid_backward(grad)?,
            Activation::Sigmoid => Tensor::f_sigmoid_backward(grad, y)?,
            Activation::Tanh => Tensor::f_tanh_backward(grad, y)?,
            Activation::Softplus(beta, threshold) => {
                x.f_softplus_backward(grad, *beta, *threshold)?
            }
        })
    }
}
