"""``clipbench bench``. The price of clipping, timed."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import UserError, nearest


def main(argv: list[str]) -> int:
    import argparse

    import torch

    from experiments.analysis.price import markdown, write_price
    from experiments.training.bench import METHODS, MODELS, OPTIMIZERS, bench

    parser = argparse.ArgumentParser(
        prog="clipbench bench",
        description="Time one optimizer step with and without clipping, interleaved in one process.",
    )
    for name, choices in (("models", MODELS), ("optimizers", OPTIMIZERS), ("methods", METHODS)):
        parser.add_argument(f"--{name}", default=",".join(choices), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument(
        "--out", default="results/bench", help="folder of table and chart (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    asked = {}
    for name, choices in (("models", MODELS), ("optimizers", OPTIMIZERS), ("methods", METHODS)):
        asked[name] = getattr(args, name).split(",")
        for word in asked[name]:
            if word not in choices:
                raise UserError(f"--{name} takes {', '.join(choices)}, got {word!r}.{nearest(word, choices)}")
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device takes cpu, or cuda where there is one, got {args.device!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows, place = bench(
        **asked, device=torch.device(args.device), dtype=getattr(torch, args.dtype), rounds=args.rounds
    )
    rows = [row._asdict() for row in rows]
    paths = write_price(Path(args.out), rows, place)
    print(markdown(rows, place))
    print(*paths, sep="\n")
    return 0
