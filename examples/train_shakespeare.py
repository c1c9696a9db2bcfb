"""Train the example checkpoints: small Qwen3s on Shakespeare's plays, on two CPU cores.

    python examples/train_shakespeare.py                   writes examples/shakespeare/, 5 M
    python examples/train_shakespeare.py --validate-only   prints the loss of the saved bf16 weights
    python examples/train_shakespeare.py --model shakespeare-draft --steps 1500 --dropout 0
        writes examples/shakespeare-draft/, 0.8 M parameters and the same tokenizer: it drafts
        tokens for the large one (speculative decoding)

The text (examples/tinyshakespeare.txt, plays by William Shakespeare) is in the public domain. Its
last twentieth is held out. Every step's batch and dropout depend on (seed, step) alone, so a run
that was stopped continues from its state file to the same weights. Matrices are trained with Muon
(Jordan 2024: momentum whose update is orthogonalised by a Newton-Schulz iteration), all else with
AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from aios_compile.models.config import ModelConfig  # noqa: E402
from aios_compile.models.decoder import Decoder  # noqa: E402

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|turn|>", "<|end|>"
VOCAB_SIZE = 1024
CONTEXT = 512
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# name -> what differs from CONFIG, and whose tokenizer is taken over (None: train one).
MODELS: dict[str, tuple[dict[str, int], str | None]] = {
    "shakespeare": ({}, None),
    "shakespeare-draft": (
        {
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        "shakespeare",
    ),
}
GENERATION_CONFIG = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 100,
    "top_p": 0.95,
    "eos_token_id": [0, 2],
    "pad_token_id": 0,
}
# A conversation is a play: the user speaks as ROMEO and the assistant as JULIET unless a message
# has a name; a system message is the scene.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content | trim + '\\n\\n' }}
{%- elif message.role in ['user', 'assistant'] %}
{%- set speaker = message.name or ('ROMEO' if message.role == 'user' else 'JULIET') %}
{{- '<|turn|>' + speaker | upper + ':\\n' + message.content | trim + '<|end|>\\n' }}
{%- else %}
{{- raise_exception('a play has the roles system, user and assistant, not ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|turn|>JULIET:\\n' }}
{%- endif %}"""


# --- text and tokenizer ---------------------------------------------------------------------------


def split_text(path: Path) -> tuple[str, str]:
    """Return the training text and the held-out last twentieth."""
    text = path.read_text(encoding="utf-8")
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> Tokenizer:
    """Train a byte-level BPE of VOCAB_SIZE tokens; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def as_conversations(text: str, seed: int) -> str:
    """Return the plays with each speech marked as a chat turn, in conversations of a few turns."""
    chooser = random.Random(seed)
    parts = [END_OF_TEXT]
    for speech in text.split("\n\n"):
        if not re.match(r"[A-Z][A-Za-z ,']*:\n", speech):
            parts.append(speech.strip("\n") + "\n\n")
            continue
        parts.append(f"{TURN}{speech.strip()}{END_OF_TURN}\n")
        if chooser.random() < 0.15:
            parts.append(END_OF_TEXT)
    return "".join(parts)


def config_of(name: str) -> dict[str, object]:
    """Return the config.json of one of MODELS."""
    return {**CONFIG, **MODELS[name][0]}


def write_folder_files(folder: Path, tokenizer: Tokenizer, config: dict[str, object]) -> None:
    """Write everything of the Hugging Face folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN, END_OF_TURN],
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (
        ("config.json", config),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# --- optimiser ------------------------------------------------------------------------------------


def orthogonalise(update: Tensor) -> Tensor:
    """Return U V^T of update = U S V^T, nearly: five quintic Newton-Schulz steps (Jordan 2024)."""
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).to(torch.bfloat16)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(torch.float32)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, for matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimisers(model: Decoder, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [
        Muon(matrices, lr=args.lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def learning_rate(step: int, steps: int, warmup: int = 30) -> float:
    """Return the factor on each base rate: linear warm-up, then a cosine to 2 percent."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


# --- training -------------------------------------------------------------------------------------


def add_dropout(model: Decoder, probability: float) -> None:
    """Drop activations after the embedding and each block, while training; the decoder has none."""

    def drop(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def initialise(model: Decoder) -> None:
    """Draw matrices from N(0, 0.02); those that write to the residual stream are scaled down."""
    depth = len(model.model.layers)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * depth) if output else 0.02)


def batch_at(step: int, streams: tuple[Tensor, Tensor], args: argparse.Namespace) -> Tensor:
    """Return step's token ids [B, T + 1]: every eighth batch chat turns, every fourth long rows."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    stream = streams[1] if step % 8 == 7 else streams[0]
    length = CONTEXT if step % 4 == 2 else args.length
    rows = args.tokens // length
    starts = torch.randint(len(stream) - length - 1, (rows,), generator=generator)
    return torch.stack([stream[s : s + length + 1] for s in starts.tolist()])


def loss_of(model: Decoder, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Return the next-token loss in nats of ids [B, T + 1]."""
    positions = torch.arange(ids.shape[1] - 1)
    logits = model(ids[:, :-1], positions)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def nats_per_character(model: Decoder, ids: Tensor, characters: int, low: bool = False) -> float:
    """Return the loss of a text of `characters` with token ids [N], in windows of CONTEXT tokens.

    Each window shares one token with the window before it, so that all but the first are predicted.
    """
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[None, start : start + CONTEXT + 1]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total += float(loss_of(model, window, "sum"))
    model.train()
    return total / characters


Optimisers = list[torch.optim.Optimizer]


def save_state(path: Path, model: Decoder, optimisers: Optimisers, step: int, best: float) -> None:
    """Write the training state aside and rename it: a kill leaves the old or the new one."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, optimiser in enumerate(optimisers):
        for j, values in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{j}.{k}": torch.as_tensor(v) for k, v in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, str(temporary), metadata={"step": str(step), "best": repr(best)})
    os.replace(temporary, path)


def load_state(path: Path, model: Decoder, optimisers: Optimisers) -> tuple[int, float]:
    """Restore what save_state wrote; return the step and the best validation loss."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()  # a list: the file is no mapping
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in names}
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        | {"lm_head.weight": tensors["model.model.embed_tokens.weight"]}
    )
    for i, optimiser in enumerate(optimisers):
        saved = optimiser.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimiser.{i}."):
                _, _, j, key = name.split(".", 3)
                saved["state"].setdefault(int(j), {})[key] = value
        optimiser.load_state_dict(saved)
    return int(about["step"]), float(about["best"])


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Return the bf16 weights by Hugging Face name, without the tied head."""
    state = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    del state["lm_head.weight"]
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, str(temporary), metadata={"format": "pt"})
    temporary.chmod(0o644)  # the library writes 0600
    os.replace(temporary, folder / "model.safetensors")


def train(
    args: argparse.Namespace, streams: tuple[Tensor, Tensor], held_out: tuple[Tensor, int]
) -> None:
    """Train to args.steps, keep the weights of the best validation in args.out."""
    torch.manual_seed(args.seed)
    model = Decoder(ModelConfig.from_dict(config_of(args.model)))
    initialise(model)
    add_dropout(model, args.dropout)
    optimisers = make_optimisers(model, args)
    first, best = 0, math.inf
    if args.state.exists():
        first, best = load_state(args.state, model, optimisers)
        print(f"resumed at step {first}", flush=True)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(streams[0]):,} training tokens", flush=True)
    started, running = time.time(), 0.0
    for step in range(first, args.steps):
        factor = learning_rate(step, args.steps)
        for optimiser, base in zip(optimisers, (args.lr, args.adam_lr)):
            optimiser.param_groups[0]["lr"] = base * factor
        torch.manual_seed(args.seed * 7_919 + step)  # dropout
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch_at(step, streams, args))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        running = loss.item() if step == first else 0.95 * running + 0.05 * loss.item()
        done = step + 1
        if done % 10 == 0:
            pace = (time.time() - started) / (done - first)
            left = pace * (args.steps - done)
            print(
                f"step {done}/{args.steps}  loss {running:.3f} nats/token  {pace:.2f} s/step  "
                f"{left:.0f} s left",
                flush=True,
            )
        if done % args.every == 0 or done == args.steps:
            validation = nats_per_character(model, *held_out, low=True)
            kept = validation < best
            if kept:
                best = validation
                save_weights(args.out, weights_of(model))
            note = "  (kept)" if kept else ""
            print(f"step {done}  validation {validation:.4f} nats/character{note}", flush=True)
            save_state(args.state, model, optimisers, done, best)


def validate(folder: Path, held_out: tuple[Tensor, int]) -> float:
    """Return the loss of the saved bf16 weights, computed in float32."""
    model = Decoder(ModelConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return nats_per_character(model, *held_out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=ROOT / "tinyshakespeare.txt")
    parser.add_argument("--model", choices=MODELS, default="shakespeare")
    parser.add_argument("--out", type=Path, help="default examples/MODEL")
    parser.add_argument("--state", type=Path, help="default build/MODEL.state")
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row in most batches")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's rate")
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validate-only", action="store_true")
    args = parser.parse_args(arguments)
    args.out = args.out or ROOT / args.model
    args.state = args.state or ROOT.parent / "build" / f"{args.model}.state"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    training, held_out_text = split_text(args.text)
    if args.validate_only or (args.state.exists() and (args.out / "tokenizer.json").exists()):
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        owner = MODELS[args.model][1]
        tokenizer = (
            train_tokenizer(training)
            if owner is None
            else Tokenizer.from_file(str(ROOT / owner / "tokenizer.json"))
        )
        write_folder_files(args.out, tokenizer, config_of(args.model))
    held_out = (torch.tensor(tokenizer.encode(held_out_text).ids), len(held_out_text))
    if not args.validate_only:
        texts = (training, as_conversations(training, args.seed))
        plain, chat = (torch.tensor(tokenizer.encode(text).ids) for text in texts)
        train(args, (plain, chat), held_out)
    print(f"validation loss of the bf16 weights: {validate(args.out, held_out):.4f} nats/character")


if __name__ == "__main__":
    main()
