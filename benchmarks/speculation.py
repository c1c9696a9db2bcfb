"""What speculation is worth: seconds and steps of one text with and without drafts.

    python -m benchmarks.speculation [MODEL] [--draft MODEL] [--tokens 200] [--rounds 9] [--json]

Repetitive text (a stanza four times over) and free text, one sequence and four. All variants are
loaded first and take turns, so that a change of the machine's speed hits all alike; tokens must be
equal. Times are the best and the median of the rounds; steps and accepted drafts are counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from typing import Any

import aios_compile

STANZA = (
    "ROMEO:\nIs love a tender thing? it is too rough,\n"
    "Too rude, too boisterous, and it pricks like thorn.\n\n"
)
TEXTS = {"repetitive": STANZA * 4, "free": "ROMEO:\nO gentle"}
FIELDS: dict[str, Any] = {"ignore_eos": True, "seed": 1}


def variants(draft: str | None) -> dict[str, dict[str, Any] | None]:
    """Return speculative_config by name."""
    found: dict[str, dict[str, Any] | None] = {"none": None, "ngram": {"method": "ngram"}}
    for most in (1, 3, 7):
        fixed = {"method": "ngram", "num_speculative_tokens": most, "adaptive": False}
        found[f"ngram, always {most}"] = fixed
    if draft:
        found["draft model"] = {"model": draft}
    return found


def measure(models: dict[str, Any], prompts: list[str], rounds: int, **fields: Any) -> Any:
    """Return {variant: numbers}; the tokens of all variants must be equal."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    steps, tokens = {}, {}
    for _ in range(rounds):
        for name, model in models.items():
            before, begin = model.engine.stats.num_steps, time.perf_counter()
            outputs = model.generate(prompts, **FIELDS, **fields)
            seconds[name].append(time.perf_counter() - begin)
            steps[name] = model.engine.stats.num_steps - before
            tokens[name] = [output.outputs[0].token_ids for output in outputs]
    assert all(ids == tokens["none"] for ids in tokens.values()), "speculation changed a token"
    base = seconds["none"]
    return {
        name: {
            "best_ms": min(times) * 1e3,
            "median_ms": statistics.median(times) * 1e3,
            "speedup_of_best": min(base) / min(times),
            "speedup_of_median": statistics.median(base) / statistics.median(times),
            "steps": steps[name],
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="examples/shakespeare")
    parser.add_argument("--draft", default="examples/shakespeare-draft")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(
                aios_compile.load_and_compile(
                    args.model, speculative_config=config, num_threads=args.threads, progress=False
                )
            )
            for name, config in variants(args.draft).items()
        }
        for text, prompt in TEXTS.items():
            for count in (1, 4):
                for temperature in (0.0, 0.8):
                    prompts = [prompt + " " * i for i in range(count)]
                    name = f"{text}, {count} sequences, temperature {temperature:g}"
                    results[name] = measure(
                        models, prompts, args.rounds, max_tokens=args.tokens,
                        temperature=temperature,
                    )  # fmt: skip
        drafts = {name: str(m.engine.speculation) for name, m in models.items() if name != "none"}
    if args.json:
        print(json.dumps({"results": results, "drafts": drafts}, indent=2))
        return
    for title, rows in results.items():
        print(title)
        for name, row in rows.items():
            print(
                f"  {name:16} {row['best_ms']:8.1f} ms best {row['median_ms']:8.1f} ms median "
                f"{row['speedup_of_best']:5.2f}x {row['speedup_of_median']:5.2f}x "
                f"{row['steps']:5} steps"
            )
    for name, text in drafts.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
