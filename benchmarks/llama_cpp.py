"""Decode and prefill beside llama.cpp on the same checkpoint with the same bits a weight, one run.

    python -m benchmarks.llama_cpp --shape qwen3-0.6b [--rows bf16,int8,int4] [--rounds 9]

Needs llama-cpp-python (extra `bench`, built natively) and the gguf package (extra `test`). bf16 is
held against BF16, int8 (8.5 bits) against Q8_0, int4 (4.5 bits) against Q4_0, output matrix
included. Both have the same weights and threads; ours samples as well, theirs only evaluates. The
two and the read bandwidth take turns; medians and spreads of the rounds. The logits of both are
compared before any time is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aios_compile
from benchmarks.bandwidth import BandwidthProbe
from benchmarks.cpu import (
    DECODE_TOKENS,
    PROMPT_TOKENS,
    ours_decode,
    prompt_ids,
    rounds,
    weight_bytes,
)
from benchmarks.cpu import prefill_tokens_a_second as ours_prefill
from benchmarks.shapes import make

ROWS = {"bf16": ("BF16", 0.03), "int8": ("Q8_0", 0.1), "int4": ("Q4_0", 0.6)}


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the checkpoint's tensors as a GGUF file without a tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter

    from tests.formats.gguf_files import convert

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]

    def finish(writer: GGUFWriter) -> None:
        writer.add_vocab_size(vocab)
        writer.add_tokenizer_model("no_vocab")

    convert(folder, path, lambda _: GGMLQuantizationType[kind], finish)


def llama_decode(peer: Any, ids: list[int]) -> float:
    """Return llama.cpp's seconds a token at batch 1."""
    peer.reset()
    peer.eval(ids)
    begin = time.perf_counter()
    for i in range(DECODE_TOKENS):
        peer.eval([3 + i])
    return (time.perf_counter() - begin) / DECODE_TOKENS


def llama_prefill(peer: Any, ids: list[int]) -> float:
    """Return llama.cpp's tokens a second of a prompt."""
    peer.reset()
    begin = time.perf_counter()
    peer.eval(ids)
    return len(ids) / (time.perf_counter() - begin)


def row(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row: ours at `name`, llama.cpp at the same bits a weight."""
    import llama_cpp

    kind, tolerance = ROWS[name]
    path = folder / f"{kind}.gguf"
    if not path.exists():
        write_gguf(folder, path, kind)
    peer = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads,
        verbose=False,
    )  # fmt: skip
    model = aios_compile.load_and_compile(
        folder, quantization=None if name == "bf16" else name, max_model_len=1024,
        num_threads=args.threads, progress=False,
    )  # fmt: skip
    ids = prompt_ids(model.limits.vocab_size, PROMPT_TOKENS)
    peer.eval(ids)
    theirs = np.ctypeslib.as_array(peer._ctx.get_logits(), (1, peer.n_vocab()))[-1]
    got = model(torch.tensor(ids))[-1].numpy()
    error = float(np.linalg.norm(got - theirs) / np.linalg.norm(theirs))
    assert error < tolerance, f"{name}: logits differ by {error:.3f} from llama.cpp's {kind}"
    probe, moved = BandwidthProbe(args.threads), weight_bytes(model)
    ours_decode(model, ids)
    decode = rounds(
        lambda: ours_decode(model, ids),
        lambda: llama_decode(peer, ids),
        lambda: moved / probe.measure(),
        args.rounds,
    )
    pairs = []
    for seed in range(1, 6):  # other tokens each time: ours would find a prompt in its cache
        prompt = prompt_ids(model.limits.vocab_size, 256, seed)
        pairs.append((ours_prefill(model, prompt), llama_prefill(peer, prompt)))
    model.close()
    peer.close()
    return {
        "peer": f"llama.cpp {kind} ({llama_cpp.__version__})",
        "logit_difference": error,
        "bytes_a_token": moved,
        "decode": decode,
        "prefill_256_tokens_s": statistics.median(a for a, _ in pairs),
        "peer_prefill_256_tokens_s": statistics.median(b for _, b in pairs),
        "prefill_ratio": statistics.median(a / b for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--folder", default=None, help="where the random checkpoint is kept")
    parser.add_argument("--rows", default="bf16,int8,int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default=None, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = make(args.shape, Path(args.folder or Path(tempfile.gettempdir()) / args.shape))
    result: dict[str, Any] = {"shape": args.shape, "threads": args.threads}
    for name in args.rows.split(","):
        result[name] = found = row(name, folder, args)
        decode = found["decode"]
        print(
            f"{name}: {decode['ours_ms']:.1f} ms a token, {decode['ratio']:.2f}x of "
            f"{found['peer']} ({decode['ratio_spread'][0]:.2f}-{decode['ratio_spread'][1]:.2f}), "
            f"{decode['share_of_bandwidth']:.0%} of the read bandwidth; prefill "
            f"{found['prefill_256_tokens_s']:.0f} tokens/s, {found['prefill_ratio']:.2f}x",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
