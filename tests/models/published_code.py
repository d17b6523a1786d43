"""Repositories whose configs name code of their own, which Transformers has the model of.

The reference loads the same weights in the words of Transformers.
"""

from __future__ import annotations

from typing import Any

from tests.checkpoints import HIDDEN, NORMALIZE, dense
from tests.models.published import (
    CLS,
    IDENTITY,
    LABEL,
    LAST,
    LENGTH,
    MEAN,
    QWEN2,
    QWEN3,
    SETTINGS,
    VERSIONS,
    XLM_R,
    Native,
    Published,
    config,
)

FLASH = "jinaai/xlm-roberta-flash-implementation--"
FLASH_XLM_R = {
    **XLM_R,
    "emb_pooler": None,
    "matryoshka_dimensions": None,
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20000.0,
    "truncate_dim": None,
    "use_flash_attn": True,
    "use_reentrant": False,
}
"""The config of jinaai/xlm-roberta-flash-implementation."""

NEW = "Alibaba-NLP/new-impl--"
NEW_CODE = {
    "AutoConfig": f"{NEW}configuration.NewConfig",
    "AutoModel": f"{NEW}modeling.NewModel",
    "AutoModelForMaskedLM": f"{NEW}modeling.NewForMaskedLM",
    "AutoModelForMultipleChoice": f"{NEW}modeling.NewForMultipleChoice",
    "AutoModelForQuestionAnswering": f"{NEW}modeling.NewForQuestionAnswering",
    "AutoModelForSequenceClassification": f"{NEW}modeling.NewForSequenceClassification",
    "AutoModelForTokenClassification": f"{NEW}modeling.NewForTokenClassification",
}
GTE = {
    "attention_probs_dropout_prob": 0.0,
    "auto_map": NEW_CODE,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    **LABEL,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 8192,
    "model_type": "new",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pack_qkv": True,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 500000,
    "torch_dtype": "float32",
    "transformers_version": "4.39.1",
    "type_vocab_size": 0,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 30528,
}
"""The config of Alibaba-NLP/new-impl."""

HEAD_DIM = 8
MILLION = {"rope_type": "default", "rope_theta": 1000000.0}


def ntk(theta: float, factor: float) -> dict[str, Any]:
    """Return new-impl's `NTKScalingRotaryEmbedding` as linear scaling of a larger base."""
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / HEAD_DIM)}


TASKS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
PROJECTION = dense(HIDDEN, 16, activation=IDENTITY, bias=False)
NOMIC = "nomic-ai/nomic-bert-2048--"

OF_CODE: dict[str, Published] = {
    "jinaai/jina-embeddings-v3": Published(
        "JinaEmbeddingsV3",
        "Model",
        "xlm-r",
        {
            **config(FLASH_XLM_R, "XLMRobertaModel"),
            "auto_map": {
                "AutoConfig": f"{FLASH}configuration_xlm_roberta.XLMRobertaFlashConfig",
                "AutoModel": f"{FLASH}modeling_lora.XLMRobertaLoRA",
                "AutoModelForMaskedLM": f"{FLASH}modeling_xlm_roberta.XLMRobertaForMaskedLM",
                "AutoModelForPreTraining": f"{FLASH}modeling_xlm_roberta.XLMRobertaForPreTraining",
            },
            "emb_pooler": "mean",
            "load_trained_adapters": True,
            "lora_adaptations": [*TASKS],
            "lora_alpha": 1,
            "lora_dropout_p": 0.0,
            "lora_main_params_trainable": False,
            "lora_rank": 4,
            "matryoshka_dimensions": [8, 16, HIDDEN],
            "task_instructions": TASKS,
            "torch_dtype": "bfloat16",
        },
        shape={"type_vocab_size": 1},
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        settings={**VERSIONS, "prompts": TASKS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        listed={"Transformer": {"name": "transformer", "type": "custom_st.Transformer", "kwargs": ["task"]}},
        beside=("custom_st.py", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_fp16.onnx"),
        prefix="roberta.",
        tasks=tuple(TASKS),
        native=Native({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    ),
    "jinaai/jina-colbert-v2": Published(
        "JinaEmbeddingsV3",
        "Model",
        "jina-colbert",
        {
            **config(FLASH_XLM_R, "HF_ColBERT"),
            "auto_map": {
                "AutoConfig": f"{FLASH}configuration_xlm_roberta.XLMRobertaFlashConfig",
                "AutoModel": f"{FLASH}modeling_xlm_roberta.XLMRobertaModel",
            },
        },
        shape={"type_vocab_size": 1},
        files={
            "artifact.metadata": {
                "query_maxlen": 32,
                "doc_maxlen": 60,
                "dim": 16,
                "similarity": "cosine",
                "mask_punctuation": True,
                "attend_to_mask_tokens": True,
                "query_token_id": "[QueryMarker]",
                "doc_token_id": "[DocumentMarker]",
                "query_token": "[QueryMarker]",
                "doc_token": "[DocumentMarker]",
            }
        },
        beside=("pytorch_model.bin", "onnx/model.onnx"),
        prefix="roberta.",
        tensors={"linear.weight": (16, HIDDEN)},
        native=Native(
            {"architectures": ["HF_ColBERT"], "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
        ),
        reference="tokens",
    ),
    "nomic-ai/nomic-embed-text-v1.5": Published(
        "NomicBert",
        "Model",
        "bert",
        {
            "activation_function": "swiglu",
            "architectures": ["NomicBertModel"],
            "attn_pdrop": 0.0,
            "auto_map": {
                "AutoConfig": f"{NOMIC}configuration_hf_nomic_bert.NomicBertConfig",
                "AutoModel": f"{NOMIC}modeling_hf_nomic_bert.NomicBertModel",
                "AutoModelForMaskedLM": f"{NOMIC}modeling_hf_nomic_bert.NomicBertForPreTraining",
            },
            "bos_token_id": None,
            "causal": False,
            "dense_seq_output": True,
            "embd_pdrop": 0.0,
            "eos_token_id": None,
            "fused_bias_fc": True,
            "fused_dropout_add_ln": True,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-12,
            "max_trained_positions": 2048,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "model_type": "nomic_bert",
            "n_embd": 768,
            "n_head": 12,
            "n_inner": 3072,
            "n_layer": 12,
            "n_positions": 8192,
            "pad_vocab_size_multiple": 1,
            "parallel_block": False,
            "parallel_block_tied_norm": False,
            "prenorm": False,
            "qkv_proj_bias": False,
            "reorder_and_upcast_attn": False,
            "resid_pdrop": 0.0,
            "rotary_emb_base": 1000,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "rotary_scaling_factor": None,
            "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True,
            "summary_activation": None,
            "summary_first_dropout": 0.0,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "torch_dtype": "float32",
            "transformers_version": "4.37.2",
            "type_vocab_size": 2,
            "use_cache": True,
            "use_flash_attn": True,
            "use_rms_norm": False,
            "use_xentropy": True,
            "vocab_size": 30528,
        },
        shape={"type_vocab_size": 2, "layer_norm_eps": 1e-12},
        words={
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_inner": "intermediate_size",
            "n_layer": "num_hidden_layers",
            "n_positions": "max_position_embeddings",
        },
        modules=(MEAN,),
        transformer=LENGTH,
        settings=SETTINGS,
        beside=("onnx/model.onnx", "onnx/model_q4f16.onnx"),
        native=Native({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    ),
    "Alibaba-NLP/gte-base-en-v1.5": Published(
        "Gte",
        "Model",
        "bert",
        config(GTE, "NewModel"),
        shape={"type_vocab_size": 1, "layer_norm_eps": 1e-12},
        modules=(CLS,),
        transformer=LENGTH,
        settings=SETTINGS,
        beside=("onnx/model.onnx", "onnx/model_fp16.onnx"),
        native=Native(
            {"rope_parameters": ntk(500000.0, 2.0)},
            zero=("embeddings.token_type_embeddings.weight",),
        ),
    ),
    "Alibaba-NLP/gte-multilingual-base": Published(
        "Gte",
        "Model",
        "xlm-r",
        {
            **config(GTE, "NewModel"),
            "classifier_dropout": 0.0,
            "pad_token_id": 1,
            "rope_scaling": {"factor": 8.0, "type": "ntk"},
            "rope_theta": 20000,
            "torch_dtype": "float16",
            "type_vocab_size": 1,
            "vocab_size": 250048,
        },
        shape={"type_vocab_size": 1, "layer_norm_eps": 1e-12},
        modules=(CLS, NORMALIZE),
        transformer=LENGTH,
        beside=("scripts/gte_embedding.py", "images/mteb-s2p.png"),
        prefix="new.",
        tensors={"classifier.weight": (1, HIDDEN), "classifier.bias": (1,)},
        native=Native({"rope_parameters": ntk(20000.0, 8.0)}),
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": Published(
        "Qwen2",
        "ForCausalLM",
        "open",
        {
            **config(QWEN2, "Qwen2ForCausalLM"),
            "auto_map": {
                "AutoModel": "modeling_qwen.Qwen2Model",
                "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM",
                "AutoModelForSequenceClassification": "modeling_qwen.Qwen2ForSequenceClassification",
            },
            "is_causal": False,
        },
        shape={"num_key_value_heads": 2},
        modules=(LAST, NORMALIZE),
        transformer=LENGTH,
        settings={
            "prompts": {
                "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
            },
            "default_prompt_name": None,
        },
        tokenizer_config={
            "add_eos_token": True,
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]},
            "tokenizer_class": "Qwen2Tokenizer",
        },
        beside=("modeling_qwen.py", "tokenization_qwen.py", "scripts/eval_mteb.py"),
        native=Native({"is_causal": False, "rope_parameters": MILLION}, tokenizer="qwen"),
    ),
    "jinaai/jina-reranker-v2-base-multilingual": Published(
        "XLMRoberta",
        "ForSequenceClassification",
        "xlm-r",
        {
            **config(FLASH_XLM_R, "XLMRobertaForSequenceClassification"),
            **LABEL,
            "auto_map": {
                "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
                "AutoModel": "modeling_xlm_roberta.XLMRobertaModel",
                "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification",
            },
            "max_position_embeddings": 1026,
            "position_embedding_type": "absolute",
            "torch_dtype": "bfloat16",
            "use_cache": False,
        },
        shape={"type_vocab_size": 1, "num_labels": 1},
        beside=("modeling_xlm_roberta.py", "block.py", "mha.py", "onnx/model.onnx"),
        renamed={
            r"embeddings\.LayerNorm": "emb_ln",
            r"attention\.output\.dense": "mixer.out_proj",
            r"attention\.output\.LayerNorm": "norm1",
            r"intermediate\.dense": "mlp.fc1",
            r"(?<!attention\.)output\.dense": "mlp.fc2",
            r"(?<!attention\.)output\.LayerNorm": "norm2",
            r"encoder\.layer\.": "encoder.layers.",
        },
        fused=("attention.self.query", "attention.self.key", "attention.self.value", "mixer.Wqkv"),
        native=Native(),
        reference="pairs",
    ),
    "voyageai/voyage-4-nano": Published(
        "Qwen3",
        "Model",
        "qwen",
        {
            **config(QWEN3, "VoyageQwen3BidirectionalEmbedModel"),
            "auto_map": {"AutoModel": "modeling_qwen3_bidirectional.VoyageQwen3BidirectionalEmbedModel"},
            "num_labels": 16,
        },
        shape={"tie_word_embeddings": True},
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        settings={
            "prompts": {
                "query": "Represent the query for retrieving supporting documents: ",
                "document": "Represent the document for retrieval: ",
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        beside=("modeling_qwen3_bidirectional.py",),
        prefix="model.",
        tensors={"linear.weight": PROJECTION.weights["linear.weight"]},
        native=Native({"is_causal": False, "rope_parameters": MILLION}, modules=(MEAN, PROJECTION, NORMALIZE)),
    ),
}
"""By their names on the hub."""
