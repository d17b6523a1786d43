"""Tiny random checkpoints that take pictures, in the file layouts of the published ones, and pictures for them.

Weights are large enough for a picture to move every row: with small ones wrong code passes.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

TEXT = (
    "the quick brown fox jumps over a lazy dog query question passage describe image what is in this page user system "
    "assistant you are helpful instruct document search relevant table chart figure revenue report text answer yes no"
)

QWEN = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}" + PICTURE + "{% elif 'text' in part %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOST_TOKENS = 64
"""Tokens of the largest picture of the Qwen-VL checkpoints."""
STD = 0.12


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng([seed, width, height]).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def url(picture: Image.Image | bytes, kind: str = "image/png") -> str:
    """The URL of a picture, or of the bytes of a file, that holds it."""
    file = picture if isinstance(picture, bytes) else saved(picture)
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def bomb(side: int, depth: int = 1) -> bytes:
    """A PNG of few bytes and side² pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" * (1 + side * depth // 8)
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def byte_pairs(specials: tuple[str, ...], size: int) -> Tokenizer:
    """A byte-level tokenizer with these special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*[TEXT] * 3, *TEXT.split()], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random weights: vectors about the number that they start at, 1 in norms, the rest about 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            random = torch.randn(weights.shape, generator=generator)
            weights.copy_(weights.mean().round() + 0.1 * random if weights.ndim == 1 else STD * random)
    return model.eval()


def write(folder: Path, name: str, content: Any) -> None:
    """Write a JSON file."""
    (folder / name).write_text(json.dumps(content, indent=1))


def write_model(folder: Path, model: PreTrainedModel, rename: Callable[[str], str | None] = lambda name: name) -> None:
    """Write config and weights; tensors whose new name is `None` are left out."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    write(folder, "config.json", model.config.to_dict())
    tensors = {rename(name): tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # type: ignore[arg-type]


VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 64,
        "fullatt_block_indexes": [2], "window_size": 56,
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 16, "intermediate_size": 64,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    },
}  # fmt: skip
VISION["qwen3_5"] = {name: value for name, value in VISION["qwen3_vl"].items() if name != "deepstack_visual_indexes"}
GENERATORS = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def write_qwen_files(folder: Path, kind: str) -> PreTrainedTokenizerFast:
    """Write tokenizer, chat template and image processor of a Qwen-VL checkpoint."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(QWEN, 700), pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=4096
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_CHAT)
    side = 2 * VISION[kind]["patch_size"]
    least, most = 4 * side**2, MOST_TOKENS * side**2
    sizes: dict[str, Any] = {"min_pixels": least, "max_pixels": most}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    if kind in ("qwen3_vl", "qwen3_5"):
        sizes, mean, std = {"size": {"shortest_edge": least, "longest_edge": most}}, [0.5] * 3, [0.5] * 3
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "image_mean": mean, "image_std": std, "merge_size": 2,
        "patch_size": VISION[kind]["patch_size"], "temporal_patch_size": 2, "resample": 3, "rescale_factor": 1 / 255,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    }  # fmt: skip
    write(folder, "preprocessor_config.json", processor | sizes)
    return tokenizer


def qwen_config(kind: str, tokenizer: PreTrainedTokenizerFast, **text: Any) -> Any:
    """The config of a Qwen-VL checkpoint; `text` are changes of its text part."""
    ids = tokenizer.get_vocab()
    section = {"mrope_section": [2, 3, 3], "rope_theta": 1e6, "rope_type": "default"}
    more: dict[str, Any] = {}
    if kind == "qwen3_vl":
        section |= {"mrope_section": [4, 2, 2], "rope_theta": 5e6, "mrope_interleaved": True}
        more = {"head_dim": 16}
    if kind == "qwen3_5":
        section |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "mrope_interleaved": True}
        more = {
            "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        }  # fmt: skip
    part = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "rope_parameters": section,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    return AutoConfig.for_model(
        kind,
        text_config=part | more | text,
        vision_config={**VISION[kind], "temporal_patch_size": 2, "spatial_merge_size": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def qwen_vl(folder: Path, kind: str, **text: Any) -> Path:
    """A checkpoint of Qwen2-VL to Qwen3.5, without the head that it shares with the token embedding."""
    folder.mkdir(parents=True)
    tokenizer = write_qwen_files(folder, kind)
    torch.manual_seed(0)  # decays of recurrences are drawn, and kept as they are but for noise
    model = randomised(getattr(transformers, GENERATORS[kind])(qwen_config(kind, tokenizer, **text)))

    def rename(name: str) -> str | None:
        if name == "lm_head.weight":
            return None
        if kind in ("qwen3_vl", "qwen3_5"):
            return name
        return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))

    write_model(folder, model, rename)
    return folder


def jina_reranker_m0(folder: Path) -> Path:
    """A checkpoint of jina-reranker-m0."""
    qwen_vl(folder, "qwen2_vl")
    config = json.loads((folder / "config.json").read_text())
    hidden = config["text_config"]["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (hidden, hidden), "0.bias": (hidden,), "2.weight": (1, hidden), "2.bias": (1,)}
    tensors |= {f"score.{name}": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"architectures": ["JinaVLForRanking"], "auto_map": {"AutoModel": "modeling.JinaVLForRanking"}}
    write(folder, "config.json", {**config, **code})
    return folder


ERNIE = (
    "<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>",
)  # fmt: skip
ERNIE_PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
ERNIE_CHAT = (
    "<|begin_of_sentence|>{% set pictures = namespace(count=0) %}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {% elif message.role == 'user' %}User: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{% set pictures.count = pictures.count + 1 %}"
    "Picture {{ pictures.count }}:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<|end_of_sentence|>{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def ernie_vl(folder: Path) -> Path:
    """An Ernie-4.5-VL-MoE reward model, as FastDeploy serves it."""
    folder.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(ERNIE, 600), bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        unk_token="<unk>", model_max_length=4096,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(ERNIE_CHAT)
    processor = {
        "image_processor_type": "Ernie4_5_VLMoeImageProcessor", "patch_size": 14, "merge_size": 2, "resample": 3,
        "temporal_patch_size": 1, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 4 * 28**2, "longest_edge": MOST_TOKENS * 28**2},
    }  # fmt: skip
    write(folder, "preprocessor_config.json", processor)
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "moe_intermediate_size": [32, 16],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        "pad_token_id": ids["<unk>"],
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 14}
    names = {f"{kind}_{place}token_id": f"<|{kind.upper()}_{word}|>" for kind in ("image", "video")
             for place, word in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))}  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, **{key: ids[name] for key, name in names.items()}
    )
    randomised(transformers.Ernie4_5_VLMoeModel(config)).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    head = {
        "rm_head.up_gate_proj.weight": STD * torch.randn(128, 64, generator=generator),
        "rm_head.down_proj.weight": torch.randn(1, 64, generator=generator),
    }
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**written, "architectures": ["Ernie4_5_VLMoeForProcessRewardModel"]})
    return folder


CLIP_TOKENS = 17
"""Tokens of a picture of the CLIP checkpoint: 4 x 4 patches and the class token."""


def clip(folder: Path) -> Path:
    """A CLIP checkpoint."""
    folder.mkdir(parents=True)
    tokenizer = byte_pairs(("<|startoftext|>", "<|endoftext|>"), 600)
    ids = {text: tokenizer.token_to_id(text) for text in ("<|startoftext|>", "<|endoftext|>")}
    tokenizer.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        pair="<|startoftext|> $A <|endoftext|> $B <|endoftext|>",
        special_tokens=list(ids.items()),
    )
    begin, end = ids.values()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    processor = {
        "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 56, "size": 56, "resample": 3,
        "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    write(folder, "preprocessor_config.json", processor)
    text = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 32,
        "vocab_size": end + 1,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": 24,
    }
    vision = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 56,
        "patch_size": 14, "projection_dim": 24,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    write_model(folder, randomised(transformers.CLIPModel(config)))
    return folder


SIGLIP_LENGTH = 64
"""Tokens of every text of the SigLIP checkpoints."""


def write_siglip_tokenizer(folder: Path, kind: str) -> PreTrainedTokenizerFast:
    """Write the tokenizer of SigLIP, or Gemma's with lower case, as SigLIP 2 has it."""
    options: dict[str, Any] = {"model_max_length": SIGLIP_LENGTH, "padding_side": "right", "pad_token": "<pad>"}
    options["model_input_names"] = ["input_ids"]
    made: Any
    if kind == "siglip2":
        texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
        vocabulary = {text: number for number, text in enumerate([*texts, *map(chr, range(97, 123))])}
        made = transformers.Siglip2Tokenizer(vocab=vocabulary, add_eos_token=True, add_bos_token=False, **options)
    else:
        tokenizer = byte_pairs(("<pad>", "</s>"), 600)
        ends = [("</s>", tokenizer.token_to_id("</s>"))]
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=ends)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)
    made.save_pretrained(folder)
    return made  # type: ignore[no-any-return]


def siglip(folder: Path, kind: str) -> Path:
    """A SigLIP checkpoint, or one of SigLIP 2 with any resolution ("siglip2")."""
    folder.mkdir(parents=True)
    tokenizer = write_siglip_tokenizer(folder, kind)
    processor: dict[str, Any] = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    text = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": SIGLIP_LENGTH,
        "vocab_size": 1024,
        "projection_size": 64,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    if kind == "siglip2":
        sizes = {"patch_size": 16, "max_num_patches": 81}
        processor |= {"image_processor_type": "Siglip2ImageProcessor", "resample": 2, **sizes}
        config = transformers.Siglip2Config(
            text_config=text, vision_config={**vision, "patch_size": 16, "num_patches": 81}
        )
        model: Any = transformers.Siglip2Model(config)
    else:
        processor |= {
            "image_processor_type": "SiglipImageProcessor",
            "resample": 3,
            "size": {"height": 56, "width": 56},
        }
        config = transformers.SiglipConfig(
            text_config=text, vision_config={**vision, "image_size": 56, "patch_size": 14}
        )
        model = transformers.SiglipModel(config)
    write(folder, "preprocessor_config.json", processor)
    write_model(folder, randomised(model))
    return folder


@cache
def processor_class(name: str) -> Any:
    """A processor of Transformers without its part for videos, which needs torchvision."""
    kind = getattr(transformers, name)

    def get_attributes(cls: Any) -> list[str]:
        return [attribute for attribute in super(made, cls).get_attributes() if attribute != "video_processor"]

    made: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes), "__module__": __name__})
    return made


QUERY_SUFFIX = "<|endoftext|>" * 10
PAGE = f"<|im_start|>user\n{PICTURE}Describe the image."
COL_WIDTH = 16
"""Length of the projected rows of the late-interaction checkpoints."""


def colqwen2(folder: Path, kind: str = "qwen2_vl") -> Path:
    """A ColQwen2 checkpoint; over Qwen2.5-VL as well."""
    folder.mkdir(parents=True)
    tokenizer = write_qwen_files(folder, kind)
    processor = {
        "processor_class": "ColQwen2Processor",
        "visual_prompt_prefix": f"{PAGE}<|im_end|><|endoftext|>",
        "query_prefix": "Query: ",
    }
    write(folder, "processor_config.json", processor)
    vlm = qwen_config(kind, tokenizer).to_dict()
    config = transformers.ColQwen2Config(vlm_config=vlm, embedding_dim=COL_WIDTH)
    model = randomised(transformers.ColQwen2ForRetrieval(config))
    write_model(folder, model, lambda name: re.sub(r"^vlm\.(language_model|visual)\.", r"vlm.model.\1.", name))
    return folder


def _random(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def colqwen3(folder: Path, variant: str) -> Path:
    """A ColQwen3 checkpoint in the layout of TomoroAI ("tomoro"), OpenSearch-AI ("ops") or NVIDIA ("nemotron")."""
    qwen_vl(folder, "qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    hidden = config["text_config"]["hidden_size"]
    if variant == "tomoro":
        tensors = {f"vlm.{name}": tensor for name, tensor in tensors.items()}
        tensors["vlm.lm_head.weight"] = _random(config["text_config"]["vocab_size"], hidden)
        tensors |= {
            "embedding_proj_layer.weight": _random(COL_WIDTH, hidden), "embedding_proj_layer.bias": _random(COL_WIDTH)
        }  # fmt: skip
        kept = ("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id")
        config = {name: config[name] for name in (*kept, "vision_end_token_id", "dtype")}
        config |= {"architectures": ["ColQwen3"], "model_type": "colqwen3", "embed_dim": COL_WIDTH}
        config |= {"padding_side": "left"}
    elif variant == "ops":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors |= {"custom_text_proj.weight": _random(hidden, hidden), "custom_text_proj.bias": _random(hidden)}
        config |= {"architectures": ["OpsColQwen3Model"], "model_type": "ops_colqwen3", "dims": COL_WIDTH}
    else:
        config |= {"architectures": ["Qwen3VLNemotronEmbedModel"], "model_type": "qwen3_vl_nemotron_embed"}
        config |= {"pooling": "colbert"}
    (name,) = config["architectures"]
    config["auto_map"] = {"AutoConfig": f"configuration_x.{name}Config", "AutoModel": f"modeling_x.{name}"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write(folder, "config.json", config)
    return folder


def colqwen3_5(folder: Path, contract: str | None = None) -> Path:
    """A ColQwen3.5 checkpoint, as colpali-engine saves it; `contract` says whether tokens attend both ways."""
    qwen_vl(folder, "qwen3_5")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor.contiguous() for name, tensor in tensors.items()}
    hidden = config["text_config"]["hidden_size"]
    tensors |= {"custom_text_proj.weight": _random(COL_WIDTH, hidden), "custom_text_proj.bias": _random(COL_WIDTH)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"architectures": ["ColQwen3_5"], "dim": COL_WIDTH}
    if contract is not None:
        config["retrieval_attention_contract"] = contract
    write(folder, "config.json", config)
    return folder


def colpali(folder: Path) -> Path:
    """A ColPali checkpoint."""
    folder.mkdir(parents=True)
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
    tokenizer = byte_pairs(specials, 600)
    tokenizer.add_tokens([AddedToken(f"<loc{i:0>4}>", normalized=False) for i in range(1024)])
    tokenizer.add_tokens([AddedToken(f"<seg{i:0>3}>", normalized=False) for i in range(128)])
    ids = {text: tokenizer.token_to_id(text) for text in specials}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="right", model_max_length=4096, extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(folder)  # fmt: skip
    processor = {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "ColPaliProcessor", "image_seq_length": 16,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "size": {"height": 56, "width": 56},
    }  # fmt: skip
    write(folder, "preprocessor_config.json", processor)
    write(folder, "processor_config.json", {"processor_class": "ColPaliProcessor"})
    text = {
        "model_type": "gemma", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 128,
        "max_position_embeddings": 4096, "pad_token_id": ids["<pad>"], "num_image_tokens": 16,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 56, "patch_size": 14, "projection_dim": 64, "vision_use_head": False,
    }  # fmt: skip
    vlm = {
        "model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 64,
        "image_token_index": ids["<image>"], "hidden_size": 64, "pad_token_id": ids["<pad>"],
        "vocab_size": tokenizer.get_vocab_size(),
    }  # fmt: skip
    config = transformers.ColPaliConfig(vlm_config=vlm, embedding_dim=COL_WIDTH)

    def rename(name: str) -> str:
        name = name.replace("vlm.language_model.", "vlm.language_model.model.")
        return re.sub(r"vlm\.vision_tower\.(?!vision_model)", "vlm.vision_tower.vision_model.", name)

    write_model(folder, randomised(transformers.ColPaliForRetrieval(config)), rename)
    return folder


def vocabulary(folder: Path) -> dict[str, int]:
    """The ids of a checkpoint's vocabulary by their entries."""
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()  # type: ignore[no-any-return]


def without_video(monkeypatch: Any, name: str) -> None:
    """Let sentence-transformers load this processor without its part for videos, and by Pillow alone."""
    from sentence_transformers.base.modules import transformer

    def from_pretrained(folder: str, **options: Any) -> Any:
        return processor_class(name).from_pretrained(folder, backend="pil", **options)

    monkeypatch.setattr(transformer.AutoProcessor, "from_pretrained", from_pretrained)
