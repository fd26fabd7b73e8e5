"""A Llama of transformers in llama.cpp: its weights as GGUF, and what its server says.

The server is llama.cpp's own `llama-server`, on the path or named by LLAMA_SERVER. It
computes in float32 here, its cache of keys and values too.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of a log-probability: all is float32, but ggml's exp and the order of its sums are its
# own. The unsteered model has to agree as well as the steered one.
ALLOWED = 1e-4
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def server() -> str | None:
    """The path of `llama-server`, if there is one."""
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


def version() -> str:
    """What the server says of itself."""
    done = subprocess.run(
        [str(server()), "--version"], capture_output=True, text=True, check=True
    )
    text = done.stdout + done.stderr
    return next(line for line in text.splitlines() if "version" in line)


def write_model(model: Any, path: Path) -> None:
    """The weights of a `LlamaForCausalLM` as llama.cpp reads them, in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    # Words are not needed, token ids are sent; but the server wants a vocabulary.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{n}>" for n in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    for name, tensor in _tensors(model):
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for layer, block in enumerate(model.model.layers):
        for name, inside in _PARTS.items():
            weight = block.get_submodule(inside).weight
            if name in ("attn_q", "attn_k"):
                heads = {
                    "attn_q": config.num_attention_heads,
                    "attn_k": config.num_key_value_heads,
                }[name]
                # transformers rotates halves of a head, llama.cpp neighbours.
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{name}.weight", weight


def rename(path: Path, old: bytes, new: bytes) -> None:
    """Give a tensor in a GGUF file another name of the same length."""
    path.write_bytes(path.read_bytes().replace(old, new))


def log_probabilities(model: Path, vector: Path | None, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the token after `ids`, by token id."""
    with _serving(model, vector) as address:
        ask = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": 10_000,
            "cache_prompt": False,
            "temperature": 1.0,
        }
        request = urllib.request.Request(
            f"{address}/completion",
            json.dumps(ask).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    found = torch.full((len(said),), float("nan"))
    for entry in said:
        found[entry["id"]] = entry["logprob"]
    return found


@contextmanager
def _serving(model: Path, vector: Path | None) -> Iterator[str]:
    """The address of a server, for as long as it is needed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(server()), "-m", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "-c", "64", "-t", "1", "--no-warmup"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    command += ["--control-vector", str(vector)] if vector else []
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait(process, address)
            yield address
        finally:
            process.terminate()


def _wait(process: "subprocess.Popen[bytes]", address: str) -> None:
    """Wait until the server is up.

    Raises:
        RuntimeError: If it ends instead, or does not come up.
    """
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode}.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("The server did not answer within a minute.")
