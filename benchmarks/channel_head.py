"""Cost of TokenBridge's channel head: all channels of some rows drawn with its cache, against the prefix run anew.

    python benchmarks/channel_head.py [--rows 16 64 256] [--size l] [--repeats 5] [--threads 2] [--device cpu]

Random weights of a published size. Prints, for every number of rows, the best seconds of both ways in the same run,
their ratio, and whether the ids are the same.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from varzoo.loading import build, compose_config
from varzoo.nn.channel_transformer import ChannelTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--size", default="l", help="as in the names of the generator configs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = compose_config("sample", [f"generator=tokenbridge_{options.size}", "checkpoint=none"])
    with torch.device(options.device):
        head = build(config.generator).head
    for name, parameter in head.named_parameters():
        if "modulation" in name:  # zero at first, which would hide any difference
            nn.init.normal_(parameter, std=0.02)
    print(f"{'rows':>5} {'channels':>9} {'anew':>9} {'cached':>9} {'ratio':>6} {'same ids':>9}")
    for rows in options.rows:
        features = torch.randn(rows, head.condition.in_features, device=options.device)
        noise = -torch.empty(head.channels, rows, head.levels, device=options.device).exponential_().log()  # Gumbel
        seconds: dict[str, list[float]] = {"anew": [], "cached": []}
        for _ in range(options.repeats):
            start = time.perf_counter()
            reference = anew(head, features, noise).cpu()  # waits for an accelerator
            middle = time.perf_counter()
            ours = cached(head, features, noise).cpu()
            seconds["anew"].append(middle - start)
            seconds["cached"].append(time.perf_counter() - middle)
        before, after = min(seconds["anew"]), min(seconds["cached"])
        same = (ours == reference).double().mean().item()
        print(f"{rows:5d} {head.channels:9d} {before:7.3f} s {after:7.3f} s {before / after:6.2f} {100 * same:7.2f} %",
              flush=True)


@torch.inference_mode()
def anew(head: ChannelTransformer, features: Tensor, noise: Tensor) -> Tensor:
    """Ids `[R, channels]`, the whole prefix at every channel."""
    ids = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
    for k in range(head.channels):
        hidden = head.hidden(features, ids, sampling=True)[:, -1]
        ids = torch.cat([ids, (head.classifiers[k](hidden) + noise[k]).argmax(dim=-1, keepdim=True)], dim=1)
    return ids


@torch.inference_mode()
def cached(head: ChannelTransformer, features: Tensor, noise: Tensor) -> Tensor:
    """Ids `[R, channels]`, as `ChannelPrediction` draws them."""
    state, drawn = head.start(features), []
    for k in range(head.channels):
        logits = head.step(state, k, drawn[-1] if drawn else None)
        drawn.append((logits + noise[k]).argmax(dim=-1))
    return torch.stack(drawn, dim=1)


if __name__ == "__main__":
    main()
