"""Writes a model without weights that vLLM serves on a CPU: 2 layers, hidden size 256, head size 64.

Runs in vLLM's environment: ``python tiny_model.py FOLDER``. The tokenizer covers the whole vocabulary; with a small
one the detokenizer waits for valid text and turns quadratic.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 32_768
END = 256


def main(folder: str) -> None:
    words = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words["<|endoftext|>"] = END
    words.update({f"Ġw{index}": index for index in range(END + 1, VOCABULARY)})
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=END,
        eos_token_id=END,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
