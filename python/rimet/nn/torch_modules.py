"""Quantized twins of the modules of ``torch.nn``, row by row."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rimet.nn.mixin import QuantizationMixin, run_with_parameters
from rimet.nn.registry import stateless, twin

# -- linear and convolution ------------------------------------------------------------------------


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _conv(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


_WEIGHT_BIAS = ("weight", "bias")

QuantizedLinear = twin(nn.Linear, call=_linear, parameters=_WEIGHT_BIAS, function=F.linear)
QuantizedNonDynamicallyQuantizableLinear = twin(
    NonDynamicallyQuantizableLinear, bases=(QuantizedLinear, NonDynamicallyQuantizableLinear)
)
QuantizedBilinear = twin(nn.Bilinear, 2)
QuantizedConv1d = twin(nn.Conv1d, call=_conv, parameters=_WEIGHT_BIAS, function=F.conv1d)
QuantizedConv2d = twin(nn.Conv2d, call=_conv, parameters=_WEIGHT_BIAS, function=F.conv2d)
QuantizedConv3d = twin(nn.Conv3d, call=_conv, parameters=_WEIGHT_BIAS, function=F.conv3d)
QuantizedConvTranspose1d = twin(nn.ConvTranspose1d, fresh=True, function=F.conv_transpose1d)
QuantizedConvTranspose2d = twin(nn.ConvTranspose2d, fresh=True, function=F.conv_transpose2d)
QuantizedConvTranspose3d = twin(nn.ConvTranspose3d, fresh=True, function=F.conv_transpose3d)
QuantizedFold = stateless(nn.Fold)
QuantizedUnfold = stateless(nn.Unfold)

# -- normalization ---------------------------------------------------------------------------------


def _layer_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _group_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.group_norm(x, module.num_groups, weight, bias, module.eps)


def _rms_norm(module: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    return F.rms_norm(x, module.normalized_shape, weight, module.eps)


def _batch_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not module.training and module.running_mean is not None:
        module._check_input_dim(x)
        return F.batch_norm(
            x, module.running_mean, module.running_var, weight, bias, False, 0.0, module.eps
        )
    # Statistics of the batch, and the update of the running ones, are left to the original.
    tensors = {"weight": weight, "bias": bias}
    output: Tensor = run_with_parameters(
        module, nn.modules.batchnorm._BatchNorm.forward, tensors, (x,), {}, pure=True
    )
    return output


QuantizedBatchNorm1d = twin(
    nn.BatchNorm1d, call=_batch_norm, parameters=_WEIGHT_BIAS, function=F.batch_norm
)
QuantizedBatchNorm2d = twin(
    nn.BatchNorm2d, call=_batch_norm, parameters=_WEIGHT_BIAS, function=F.batch_norm
)
QuantizedBatchNorm3d = twin(
    nn.BatchNorm3d, call=_batch_norm, parameters=_WEIGHT_BIAS, function=F.batch_norm
)
QuantizedSyncBatchNorm = twin(nn.SyncBatchNorm, function=F.batch_norm)
QuantizedInstanceNorm1d = twin(nn.InstanceNorm1d, function=F.instance_norm)
QuantizedInstanceNorm2d = twin(nn.InstanceNorm2d, function=F.instance_norm)
QuantizedInstanceNorm3d = twin(nn.InstanceNorm3d, function=F.instance_norm)
QuantizedLayerNorm = twin(
    nn.LayerNorm, call=_layer_norm, parameters=_WEIGHT_BIAS, function=F.layer_norm
)
QuantizedGroupNorm = twin(
    nn.GroupNorm, call=_group_norm, parameters=_WEIGHT_BIAS, function=F.group_norm
)
# Not in AIMET.
QuantizedRMSNorm = twin(nn.RMSNorm, call=_rms_norm, parameters=("weight",), function=F.rms_norm)
QuantizedLocalResponseNorm = stateless(nn.LocalResponseNorm)

# Activations and pooling return a new tensor, or their argument if told to work in place.
# -- activations -----------------------------------------------------------------------------------

QuantizedCELU = stateless(nn.CELU, fresh=True)
QuantizedELU = stateless(nn.ELU, fresh=True)
QuantizedGELU = stateless(nn.GELU, fresh=True)
QuantizedGLU = stateless(nn.GLU, fresh=True)
QuantizedHardshrink = stateless(nn.Hardshrink, fresh=True)
QuantizedHardsigmoid = stateless(nn.Hardsigmoid, fresh=True)
QuantizedHardswish = stateless(nn.Hardswish, fresh=True)
QuantizedHardtanh = stateless(nn.Hardtanh, fresh=True)
QuantizedLeakyReLU = stateless(nn.LeakyReLU, fresh=True)
QuantizedLogSigmoid = stateless(nn.LogSigmoid, fresh=True)
QuantizedLogSoftmax = stateless(nn.LogSoftmax, fresh=True)
QuantizedMish = stateless(nn.Mish, fresh=True)
QuantizedPReLU = twin(nn.PReLU, fresh=True)
QuantizedRReLU = stateless(nn.RReLU, fresh=True)
QuantizedReLU = stateless(nn.ReLU, fresh=True)
QuantizedReLU6 = stateless(nn.ReLU6, fresh=True)
QuantizedSELU = stateless(nn.SELU, fresh=True)
QuantizedSiLU = stateless(nn.SiLU, fresh=True)
QuantizedSigmoid = stateless(nn.Sigmoid, fresh=True)
QuantizedSoftmax = stateless(nn.Softmax, fresh=True)
QuantizedSoftmax2d = stateless(nn.Softmax2d, fresh=True)
QuantizedSoftmin = stateless(nn.Softmin, fresh=True)
QuantizedSoftplus = stateless(nn.Softplus, fresh=True)
QuantizedSoftshrink = stateless(nn.Softshrink, fresh=True)
QuantizedSoftsign = stateless(nn.Softsign, fresh=True)
QuantizedTanh = stateless(nn.Tanh, fresh=True)
QuantizedTanhshrink = stateless(nn.Tanhshrink, fresh=True)
QuantizedThreshold = stateless(nn.Threshold, fresh=True)

# -- pooling ---------------------------------------------------------------------------------------

QuantizedAdaptiveAvgPool1d = stateless(nn.AdaptiveAvgPool1d, fresh=True)
QuantizedAdaptiveAvgPool2d = stateless(nn.AdaptiveAvgPool2d, fresh=True)
QuantizedAdaptiveAvgPool3d = stateless(nn.AdaptiveAvgPool3d, fresh=True)
QuantizedAdaptiveMaxPool1d = stateless(nn.AdaptiveMaxPool1d, fresh=True)
QuantizedAdaptiveMaxPool2d = stateless(nn.AdaptiveMaxPool2d, fresh=True)
QuantizedAdaptiveMaxPool3d = stateless(nn.AdaptiveMaxPool3d, fresh=True)
QuantizedAvgPool1d = stateless(nn.AvgPool1d, fresh=True)
QuantizedAvgPool2d = stateless(nn.AvgPool2d, fresh=True)
QuantizedAvgPool3d = stateless(nn.AvgPool3d, fresh=True)
QuantizedFractionalMaxPool2d = stateless(nn.FractionalMaxPool2d)
QuantizedFractionalMaxPool3d = stateless(nn.FractionalMaxPool3d)
QuantizedLPPool1d = stateless(nn.LPPool1d, fresh=True)
QuantizedLPPool2d = stateless(nn.LPPool2d, fresh=True)
# Not in AIMET.
QuantizedLPPool3d = stateless(nn.LPPool3d, fresh=True)
QuantizedMaxPool1d = stateless(nn.MaxPool1d, fresh=True)
QuantizedMaxPool2d = stateless(nn.MaxPool2d, fresh=True)
QuantizedMaxPool3d = stateless(nn.MaxPool3d, fresh=True)
QuantizedMaxUnpool1d = stateless(nn.MaxUnpool1d, fresh=True)
QuantizedMaxUnpool2d = stateless(nn.MaxUnpool2d, fresh=True)
QuantizedMaxUnpool3d = stateless(nn.MaxUnpool3d, fresh=True)

# -- padding, resizing, rearranging ----------------------------------------------------------------

QuantizedChannelShuffle = stateless(nn.ChannelShuffle)
QuantizedCircularPad1d = stateless(nn.CircularPad1d)
QuantizedCircularPad2d = stateless(nn.CircularPad2d)
QuantizedCircularPad3d = stateless(nn.CircularPad3d)
QuantizedConstantPad1d = stateless(nn.ConstantPad1d)
QuantizedConstantPad2d = stateless(nn.ConstantPad2d)
QuantizedConstantPad3d = stateless(nn.ConstantPad3d)
QuantizedFlatten = stateless(nn.Flatten)
QuantizedPixelShuffle = stateless(nn.PixelShuffle)
QuantizedPixelUnshuffle = stateless(nn.PixelUnshuffle)
QuantizedReflectionPad1d = stateless(nn.ReflectionPad1d)
QuantizedReflectionPad2d = stateless(nn.ReflectionPad2d)
QuantizedReflectionPad3d = stateless(nn.ReflectionPad3d)
QuantizedReplicationPad1d = stateless(nn.ReplicationPad1d)
QuantizedReplicationPad2d = stateless(nn.ReplicationPad2d)
QuantizedReplicationPad3d = stateless(nn.ReplicationPad3d)
QuantizedUnflatten = stateless(nn.Unflatten)
QuantizedUpsample = stateless(nn.Upsample)
QuantizedUpsamplingBilinear2d = stateless(nn.UpsamplingBilinear2d)
QuantizedUpsamplingNearest2d = stateless(nn.UpsamplingNearest2d)
QuantizedZeroPad1d = stateless(nn.ZeroPad1d)
QuantizedZeroPad2d = stateless(nn.ZeroPad2d)
QuantizedZeroPad3d = stateless(nn.ZeroPad3d)

# -- dropout ---------------------------------------------------------------------------------------

QuantizedAlphaDropout = stateless(nn.AlphaDropout)
QuantizedDropout = stateless(nn.Dropout)
QuantizedDropout1d = stateless(nn.Dropout1d)
QuantizedDropout2d = stateless(nn.Dropout2d)
QuantizedDropout3d = stateless(nn.Dropout3d)
QuantizedFeatureAlphaDropout = stateless(nn.FeatureAlphaDropout)

# -- embedding -------------------------------------------------------------------------------------


def _embedding(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(
        x,
        weight,
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )


# Indices are not quantized: no input slot.
QuantizedEmbedding = twin(
    nn.Embedding, 0, call=_embedding, parameters=("weight",), function=F.embedding
)
# Of the arguments of an embedding bag, only the weights of its samples are quantized.
QuantizedEmbeddingBag = twin(nn.EmbeddingBag, ("per_sample_weights",), function=F.embedding_bag)

# -- distances and losses --------------------------------------------------------------------------

QuantizedCosineSimilarity = stateless(nn.CosineSimilarity, 2)
QuantizedPairwiseDistance = stateless(nn.PairwiseDistance, 2)
QuantizedBCELoss = stateless(nn.BCELoss, 2)
QuantizedBCEWithLogitsLoss = stateless(nn.BCEWithLogitsLoss, 2)
QuantizedCTCLoss = stateless(nn.CTCLoss)
QuantizedCosineEmbeddingLoss = stateless(nn.CosineEmbeddingLoss, 2)
QuantizedCrossEntropyLoss = stateless(nn.CrossEntropyLoss, 2)
QuantizedGaussianNLLLoss = stateless(nn.GaussianNLLLoss, 3)
QuantizedHingeEmbeddingLoss = stateless(nn.HingeEmbeddingLoss)
QuantizedHuberLoss = stateless(nn.HuberLoss, 2)
QuantizedKLDivLoss = stateless(nn.KLDivLoss, 2)
QuantizedL1Loss = stateless(nn.L1Loss, 2)
QuantizedMSELoss = stateless(nn.MSELoss, 2)
QuantizedMarginRankingLoss = stateless(nn.MarginRankingLoss, 2)
QuantizedMultiLabelMarginLoss = stateless(nn.MultiLabelMarginLoss)
QuantizedMultiLabelSoftMarginLoss = stateless(nn.MultiLabelSoftMarginLoss)
QuantizedMultiMarginLoss = stateless(nn.MultiMarginLoss)
QuantizedNLLLoss = stateless(nn.NLLLoss)
# Made from the class that `NLLLoss2d` is another name for: making a subclass of a deprecated class
# warns.
QuantizedNLLLoss2d = stateless(
    nn.NLLLoss2d, name="QuantizedNLLLoss2d", bases=(QuantizationMixin, nn.NLLLoss)
)
QuantizedPoissonNLLLoss = stateless(nn.PoissonNLLLoss, 2)
QuantizedSmoothL1Loss = stateless(nn.SmoothL1Loss, 2)
QuantizedSoftMarginLoss = stateless(nn.SoftMarginLoss)
QuantizedTripletMarginLoss = stateless(nn.TripletMarginLoss, 3)
QuantizedTripletMarginWithDistanceLoss = stateless(nn.TripletMarginWithDistanceLoss, 3)

QuantizationMixin.ignore(nn.Identity)

__all__ = [_name for _name in list(globals()) if _name.startswith("Quantized")]
