"""The forward pass with every matrix replaced by a few subcomponents, beside the model's own."""

from typing import Any

import torch

from spd_lens.bench.measure import Work, check, counted, in_turns, short, with_threads
from spd_lens.bench.models import LAYERS, VOCABULARY, WIDTH, check_class, gpt2, random_tokens
from spd_lens.config import SPDConfig
from spd_lens.training import decompose


@with_threads
@torch.no_grad()
def bench_forward(
    model: str, subcomponents: int = 64, batch: int = 4, length: int = 64, threads: int = 1, device: str = "cpu", rounds: int = 7,
    layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY,
) -> dict[str, Any]:  # fmt: skip
    """Four forward passes in turns, without gradients, on random weights of GPT-2's shape.

    Args:
        model: `HookedTransformer` or `TransformerBridge`.
        rounds: how many times each; medians are given.

    Returns:
        `plain_s`, the model as it is; `hooks_s`, with a hook that does nothing at each point where ours would be; `run_s`,
        `Decomposition.run`, every matrix replaced under masks `[b, s, C]`; `run_with_hooks_s`, the same through the model's
        `run_with_hooks(decomposition.hooks(masks))`; `ratio`, run over plain of the same round, with its least and
        greatest, and `hooks_ratio` for `run_with_hooks`; the roofline of `run`, and that of the plain pass.
    """
    check(device, subcomponents=subcomponents, batch=batch, length=length, threads=threads, rounds=rounds, layers=layers, width=width,
          vocabulary=vocabulary)  # fmt: skip
    check_class(model)
    target = gpt2(model, layers, width, vocabulary, length, device)
    tokens = random_tokens(batch, length, vocabulary, device)
    # the masks are given here, so the importance functions are the smallest there are
    config = SPDConfig(subcomponents=subcomponents, importance="scalar", gate_width=1, init="random", steps=0)
    decomposition = decompose(target, tokens, config, progress=False)
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(batch, length, subcomponents, generator=generator, dtype=torch.float32, device="cpu").to(device)
        for name in decomposition.sites
    }
    idle = [(name, _nothing) for name, _ in decomposition.hooks(masks)]
    works: dict[str, Work] = {
        "plain": lambda: target(tokens, return_type="logits"),
        "hooks": lambda: target.run_with_hooks(tokens, return_type="logits", fwd_hooks=idle),
        "run": lambda: decomposition.run(tokens, masks),
        "run_with_hooks": lambda: target.run_with_hooks(tokens, return_type="logits", fwd_hooks=decomposition.hooks(masks)),
    }
    measured = in_turns(works, {name: counted(work) for name, work in works.items()}, rounds, device)
    plain = measured.roofline("plain")
    return {
        "model": model, "subcomponents": subcomponents, "batch": batch, "length": length, "threads": threads, "device": device,
        **{f"{name}_s": short(measured.median(name)) for name in works},
        **measured.ratio("run", "plain"), **measured.ratio("run_with_hooks", "plain", "hooks_ratio"), **measured.roofline("run"),
        **{f"plain_{key}": plain[key] for key in ("gflop", "roofline_s", "roofline_share")},
        "layers": layers, "width": width, "sites": len(decomposition.sites), "rounds": rounds,
    }  # fmt: skip


def _nothing(value: Any, hook: Any) -> None:
    return None
