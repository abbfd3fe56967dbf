"""Trains pocket from scratch on what make_data.py and train_tokenizer.py wrote, and exports it in Hugging Face's form.

    python tools/pocket/train.py --data .pocket --out build/pocket --minutes 6.5          one GPU
    python tools/pocket/train.py --data .pocket --out build/tiny --steps 40 --smoke       a CPU, to see that it works

Each step learns from two batches: chats (several questions in a row, the answers alone are learned) and documents (code,
help pages), and adds their losses. The learning rate falls with the share of the steps, or of the minutes, that has gone.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Pocket, Shape
from safetensors.torch import save_file
from torch import Tensor

IGNORED = -100
BOUNDARY_ID, END_ID = 0, 3  # <|endoftext|> and <|end|>, as train_tokenizer.py numbers them


def _gather(ids: np.ndarray, starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The examples of `order` one after the other, and where each begins."""
    lengths = np.diff(starts)[order]
    ends = np.cumsum(lengths)
    index = np.arange(ends[-1]) + np.repeat(starts[:-1][order] - (ends - lengths), lengths)
    return ids[index], np.concatenate(([0], ends))


def chat_batches(arrays: dict[str, np.ndarray], rows: int, tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [rows, tokens], labels [rows, tokens]) without end. A row is one conversation: <|endoftext|> and as many questions
    and answers as fit; labels are the next tokens where they belong to an answer."""
    rng = np.random.default_rng(seed)
    ids, starts, answer = arrays["chat_ids"], arrays["chat_start"], arrays["chat_answer"]
    lengths = np.diff(starts)
    usable = np.flatnonzero(lengths <= tokens)
    while True:
        order = rng.permutation(usable)
        flat, begins = _gather(ids, starts, order)
        flat = flat.astype(np.int64)
        row_of = []
        row, used = 0, 0
        for length in lengths[order].tolist():
            if used + length > tokens:
                row, used = row + 1, 0
            row_of.append(row)
            used += length
        first = np.searchsorted(row_of, np.arange(row + 2))  # of each row, its first example
        learned = np.ones(len(flat), bool)
        offset = np.arange(len(flat)) - np.repeat(begins[:-1], lengths[order])
        learned[offset < np.repeat(answer[order], lengths[order])] = False
        for start in range(0, row - rows + 1, rows):
            batch = np.full((rows, tokens + 1), BOUNDARY_ID, np.int64)
            labels = np.full((rows, tokens + 1), IGNORED, np.int64)
            for i in range(rows):
                a, b = begins[first[start + i]], begins[first[start + i + 1]]
                batch[i, 1 : 1 + b - a] = flat[a:b]
                labels[i, 1 : 1 + b - a] = np.where(learned[a:b], flat[a:b], IGNORED)
            yield torch.from_numpy(batch[:, :-1]), torch.from_numpy(labels[:, 1:])


def text_batches(arrays: dict[str, np.ndarray], rows: int, tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As `chat_batches`, of documents in a new order each time round, cut wherever a row is full; all is learned."""
    rng = np.random.default_rng(seed)
    ids, starts = arrays["text_ids"], arrays["text_start"]
    while True:
        flat, _ = _gather(ids, starts, rng.permutation(len(starts) - 1))
        flat = flat[rng.integers(tokens) :].astype(np.int64)
        size = rows * tokens
        for start in range(0, len(flat) - size - 1, size):
            part = torch.from_numpy(flat[start : start + size + 1])
            yield part[:-1].view(rows, tokens), part[1:].view(rows, tokens)


def ahead(batches: Iterator[tuple[Tensor, Tensor]], device: str, depth: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches on the device, made by a thread of their own."""
    waiting: queue.Queue = queue.Queue(depth)

    def work() -> None:
        for ids, labels in batches:
            pair = (ids.contiguous(), labels.contiguous())
            waiting.put(tuple(part.pin_memory() for part in pair) if device == "cuda" else pair)

    threading.Thread(target=work, daemon=True).start()
    while True:
        ids, labels = waiting.get()
        yield ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def loss_of(model: torch.nn.Module, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    logits = model(ids_BT)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)


def export(model: Pocket, data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = model.shape.to_config([END_ID, BOUNDARY_ID], BOUNDARY_ID)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": BOUNDARY_ID,
        "eos_token_id": [END_ID, BOUNDARY_ID],
        "pad_token_id": BOUNDARY_ID,
        "do_sample": False,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, out / name)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"exported to {out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size:,} bytes in all",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".pocket"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.5, help="of training, start-up and compilation not counted")
    parser.add_argument("--steps", type=int, default=10**9, help="stop here if the minutes have not run out")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and tiny batches")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--chat-rows", type=int, default=192)
    parser.add_argument("--chat-tokens", type=int, default=160)
    parser.add_argument("--text-rows", type=int, default=32)
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--chat-share", type=float, default=0.5, help="of the loss")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="weights to go on from: a model.safetensors")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    arrays = dict(np.load(options.data / "tokens.npz"))
    shape = Shape()
    if options.smoke:
        shape = Shape(hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2, num_kv_heads=1)
        options.chat_rows, options.text_rows, options.text_tokens, options.warmup = 8, 4, 256, 10
    model = Pocket(shape).to(device)
    model.compute_dtype = torch.bfloat16 if device == "cuda" else None
    if options.init:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(options.init, device=device))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate, betas=(0.9, 0.95), fused=device == "cuda",
    )  # fmt: skip
    chats = ahead(chat_batches(arrays, options.chat_rows, options.chat_tokens, options.seed), device)
    texts = ahead(text_batches(arrays, options.text_rows, options.text_tokens, options.seed + 1), device)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    size = sum(p.numel() for p in model.parameters())
    chat_size, text_size = len(arrays["chat_ids"]), len(arrays["text_ids"])
    print(
        f"{size:,} parameters on {where}; an epoch is {chat_size:,} tokens of chat, {text_size:,} of text", flush=True
    )

    def half_step(compute: object, batches: Iterator[tuple[Tensor, Tensor]], share: float) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compute(model_run, *next(batches))  # type: ignore[operator]
        (loss * share).backward()
        return loss.detach()

    compute, model_run = loss_of, model
    if device == "cuda" and not options.no_compile:
        compute = torch.compile(loss_of, dynamic=False, fullgraph=True)
        began = time.monotonic()
        try:
            half_step(compute, chats, 0.0)
            half_step(compute, texts, 0.0)
            torch.cuda.synchronize()
            print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
            compute = loss_of
        optimizer.zero_grad(set_to_none=True)

    tokens_per_step = options.chat_rows * options.chat_tokens + options.text_rows * options.text_tokens
    began = said = time.monotonic()
    said_step = 0
    sums = torch.zeros(2, device=device)
    step = 0
    progress = 0.0
    while True:
        if (
            step % 20 == 0
        ):  # reading the clock is free, waiting for the device is not: a step in flight is not waited for
            progress = max((time.monotonic() - began) / (60 * options.minutes), step / options.steps)
        if progress >= 1 or step >= options.steps:
            break
        rate = (
            options.learning_rate
            * min(1.0, (step + 1) / options.warmup)
            * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums[0] += half_step(compute, chats, options.chat_share)
        sums[1] += half_step(compute, texts, 1 - options.chat_share)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % (10 if options.smoke else 250) == 0:
            # This waits for the device, and so keeps the clock honest.
            chat_loss, text_loss = (sums / (step - said_step)).tolist()
            now = time.monotonic()
            speed = (step - said_step) * tokens_per_step / (now - said)
            print(
                f"step {step:6d}  {now - began:5.0f} s  rate {rate:.1e}  chat loss {chat_loss:.4f}  "
                f"text loss {text_loss:.4f}  {speed:,.0f} tokens/s",
                flush=True,
            )
            if not math.isfinite(chat_loss + text_loss):
                sys.exit("the loss is no longer finite: lower --learning-rate")
            sums.zero_()
            said, said_step = now, step
        if step % 4000 == 0:
            options.out.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.detach().cpu().bfloat16() for k, v in model.state_dict().items()},
                options.out / "checkpoint.safetensors",
            )
    print(
        f"{step} steps, {step * tokens_per_step / 1e6:.0f} M tokens in {(time.monotonic() - began) / 60:.1f} min",
        flush=True,
    )
    (options.out / "checkpoint.safetensors").unlink(missing_ok=True)
    model.compute_dtype = None
    export(model, options.data, options.out)


if __name__ == "__main__":
    main()
