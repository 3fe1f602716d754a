#!/usr/bin/env python3
"""Reads a Llama-family GGUF file as a Hugging Face model and tokenizer.

    python gguf_model.py MODEL.gguf OUT_DIR     # writes a Hugging Face folder, f32

Each tensor is dequantised to f32, gets its Hugging Face name, and the rows of
q_proj and k_proj go back to Hugging Face's order (GGUF keeps the two halves of
each rotary pair side by side). Only what SmolLM2 needs is read: `llama`
architecture, plain rope, byte-level BPE.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL = 3  # token type in `tokenizer.ggml.token_type`


def hf_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`"""
    if name in OUTER:
        return OUTER[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def unpermute(w, heads):
    """Rows of each head from (0, d/2, 1, d/2+1, ...) back to (0, 1, ..., d-1)."""
    rows, cols = w.shape
    return w.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read(path):
    """Returns (model in f32 and eval mode, tokenizer)."""
    reader = GGUFReader(path)
    field = lambda key: reader.fields[key].contents()
    if field("general.architecture") != "llama":
        sys.exit(f"{path}: architecture {field('general.architecture')!r}, expected 'llama'")
    heads = field("llama.attention.head_count")
    kv_heads = field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        w = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            w = unpermute(w, heads)
        elif ".attn_k." in tensor.name:
            w = unpermute(w, kv_heads)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(w))
    config = LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if missing != tied or unexpected:
        sys.exit(f"{path}: missing {missing}, unexpected {unexpected}")
    return model, tokenizer(field)


def tokenizer(field):
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("tokenizer.ggml.token_type")) if kind == CONTROL]
    bpe.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    model, tok = read(sys.argv[1])
    model.save_pretrained(Path(sys.argv[2]))
    tok.save_pretrained(Path(sys.argv[2]))
