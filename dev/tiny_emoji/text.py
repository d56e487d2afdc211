"""Prompts as bags of words: the tokenizer and the text encoder of the tiny emoji checkpoint."""
import logging
import re

import torch

import comfy.ops
from comfy.sd1_clip import ClipTokenWeightEncoder, escape_important, token_weights, unescape_important

from .network import CONTEXT_DIM, TOKENS

PAD = 0  # the vocabulary starts with <pad> and <unk>; <unk> was never trained, so it is not used


class WordTokenizer:
    """Prompt -> numbers of the words it has in common with the vocabulary, with ComfyUI's (word:1.3) weights.

    The vocabulary is a tensor of the checkpoint: the words in UTF-8, one a line. A plural counts as its
    singular, other words are left out. As with Stable Diffusion, a long prompt becomes several sections.
    """

    def __init__(self, embedding_directory=None, tokenizer_data={}):
        self.vocab = tokenizer_data["vocab"]
        words = bytes(self.vocab.tolist()).decode().split("\n")
        self.numbers = {word: number for number, word in enumerate(words)}

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        tokens = []
        unknown = []
        for part, weight in token_weights(escape_important(text), 1.0):
            for word in re.findall("[a-z0-9]+", unescape_important(part).lower()):
                number = self.numbers.get(word, self.numbers.get(word.removesuffix("s")))
                if number is None:
                    unknown.append(word)
                else:
                    tokens.append((number, weight, len(tokens) + 1))
        if unknown:
            logging.warning("Tiny Emoji left out the words it does not know: %s", ", ".join(unknown))
        tokens += [(PAD, 1.0, 0)] * (-len(tokens) % TOKENS if tokens else TOKENS)
        if not return_word_ids:
            tokens = [token[:2] for token in tokens]
        return {"words": [tokens[i:i + TOKENS] for i in range(0, len(tokens), TOKENS)]}

    def state_dict(self):
        return {"vocab": self.vocab}


class WordEncoder(torch.nn.Module, ClipTokenWeightEncoder):
    """Numbers of words -> their learned vectors, normalised. Words do not see each other, nor their order."""

    def __init__(self, vocab_size, device=None, dtype=None, model_options={}):
        super().__init__()
        ops = comfy.ops.manual_cast
        self.token_embedding = ops.Embedding(vocab_size, CONTEXT_DIM, device=device, dtype=dtype)
        self.final_layer_norm = ops.LayerNorm(CONTEXT_DIM, device=device, dtype=dtype)
        self.dtypes = {dtype}
        self.special_tokens = {"pad": PAD}  # what a weight of 0 turns a word into
        self.execution_device = None

    def set_clip_options(self, options):
        self.execution_device = options.get("execution_device", self.execution_device)  # newer than 0.3.75

    def reset_clip_options(self):
        self.execution_device = None

    def forward(self, numbers):
        return self.final_layer_norm(self.token_embedding(numbers, out_dtype=torch.float32))

    def encode(self, tokens):
        device = self.execution_device or self.token_embedding.weight.device
        vectors = self(torch.tensor(tokens, device=device))
        return vectors, vectors.mean(dim=1)

    def encode_token_weights(self, token_weight_pairs):
        return super().encode_token_weights(token_weight_pairs["words"])
