"""Small language models made here, for tasks that need facts to take apart: a byte-level BPE and a GPT-2-architecture transformer.

1. `Language`: the tokenizer, learnt from the texts, and the texts packed into rows of tokens, each beginning with BOS.
2. `build_model`: 4 layers, LayerNorm, learned positions, GELU, biases, attention and MLP, its own unembedding; a `HookedTransformer`, or
   (always on transformer-lens 4.x) a native `TransformerBridge`.
3. `train_model`: AdamW on the packed rows, two minutes on one core; the same seed gives the same bits.
4. `save_model`, `load_model`: a folder with the tokenizer's JSON and the parameters.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from spd_lens.errors import SPDError
from spd_lens.guards import reproducible, seeded, steady
from spd_lens.schema import Count, Natural
from spd_lens.storage import Saved, write_tensors, write_text

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4.x
    HookedTransformer = HookedTransformerConfig = None

END = "<|endoftext|>"  # begins, separates and pads, as in GPT-2
VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS = 640, 64, 4, 128, 4
ROW = 48  # tokens of a row of training text
STEPS, BATCH, RATE, DECAY, WARM_UP = 900, 24, 2e-3, 0.1, 50
TOKENIZER, PARAMETERS = "tokenizer.json", "model.safetensors"


def learn_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens: common words are one token, rare names several."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return _wrapped(bpe)


def _wrapped(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, name_or_path="spd_lens", add_bos_token=True
    )


def packed(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int = ROW) -> Int[Tensor, "N length"]:
    """The texts one after the other, each behind a BOS, cut into rows; what does not fill a row is left out. Every row begins with BOS."""
    bos: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    stream = [token for text in texts for token in (bos, *tokenizer.encode(text, add_special_tokens=False))]
    many = len(stream) // (length - 1)
    rows = torch.tensor(stream[: many * (length - 1)], dtype=torch.long, device="cpu").view(many, length - 1)
    return torch.cat([torch.full_like(rows[:, :1], bos), rows], 1)


@steady()
def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, bridge: bool | None = None) -> Any:
    """The untrained model, with the tokenizer; None makes a `HookedTransformer` where there is one."""
    bridge = HookedTransformer is None if bridge is None else bridge
    shape: dict[str, Any] = dict(n_layers=LAYERS, d_model=WIDTH, n_heads=HEADS, d_head=WIDTH // HEADS, d_mlp=4 * WIDTH, d_vocab=len(tokenizer),
                                 n_ctx=CONTEXT, act_fn="gelu_new", normalization_type="LN")  # fmt: skip
    with seeded(seed):
        if not bridge and HookedTransformer is not None and HookedTransformerConfig is not None:
            model = HookedTransformer(HookedTransformerConfig(**shape, seed=None, device="cpu"), tokenizer=tokenizer)
        else:
            from transformer_lens.config import TransformerBridgeConfig

            config = TransformerBridgeConfig(**shape, architecture="TransformerLensNative", default_prepend_bos=True)
            model = TransformerBridge.boot_native(config, tokenizer=tokenizer, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                kind = name.split(".")[-1]
                if parameter.ndim > 1:  # GPT-2's start; what writes to the residual stream smaller
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device=generator.device))
                elif kind.startswith("b"):
                    parameter.zero_()
    return model.eval()


@steady(gradients=True)
def train_model(model: Any, rows: Int[Tensor, "N length"], seed: int, steps: int = STEPS, progress: bool = True) -> None:
    """Next-token cross-entropy on batches of rows, with warm-up and a linear decay to nearly 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    with reproducible(), tqdm(total=steps, disable=not progress, desc="target", unit="step", mininterval=0.5) as bar:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, max(0.02, (steps - step) / steps))
            batch = rows[torch.randint(len(rows), (BATCH,), generator=generator, device=generator.device)]
            log_p = model(batch, return_type="logits")[:, :-1].log_softmax(-1)
            loss = -log_p.gather(-1, batch[:, 1:, None]).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
            bar.update()
    optimiser.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()):
        raise SPDError(f"the training of the target of seed {seed} went to {loss.item()}; try another seed.")


class _Made(TypedDict):
    """How a saved model was made."""

    task: str
    seed: Natural
    bridge: bool
    vocabulary: Count


def save_model(model: Any, folder: Path, task: str, seed: int) -> None:
    write_text(folder / TOKENIZER, model.tokenizer.backend_tokenizer.to_str())
    about = {"task": task, "seed": seed, "bridge": isinstance(model, TransformerBridge), "vocabulary": len(model.tokenizer)}
    write_tensors(folder / PARAMETERS, dict(model.named_parameters()), about)


def load_model(folder: Path, task: str) -> Any:
    """What `save_model` wrote for this task.

    Raises:
        SPDError: a file is missing or damaged, or the model is another task's.
    """
    saved = Saved(folder / PARAMETERS, _Made)
    if saved.about["task"] != task:
        raise SPDError(
            f"{folder} holds the target of the task {saved.about['task']!r}, and that of {task!r} was asked for; give its folder."
        )
    try:
        tokenizer = _wrapped(Tokenizer.from_file(str(folder / TOKENIZER)))
    except Exception as error:  # tokenizers raises a bare Exception
        raise SPDError(f"{folder / TOKENIZER} is no tokenizer ({error}).") from error
    model = build_model(tokenizer, saved.about["seed"], saved.about["bridge"])
    saved.copy_to(dict(model.named_parameters()))
    return model
