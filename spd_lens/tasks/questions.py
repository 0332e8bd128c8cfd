"""What a language model is asked: texts that end where one token is to be said, and that token; and how far it drifts on other text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.losses import kl_divergence
from spd_lens.sites import Hook

AT_ONCE = 128  # texts of one pass


@dataclass(frozen=True, eq=False)
class Questions:
    """Texts that end where one token is to be said.

    Attributes:
        tokens: `[N, s]`; shorter texts begin with more of the first token (BOS).
        answers: `[N]`.
    """

    tokens: Int[Tensor, "N s"]
    answers: Int[Tensor, " N"]

    @classmethod
    def of(cls, model: Any, asked: Sequence[tuple[str, str]]) -> "Questions":
        """From (text, answer); the answer's first token counts, with the space before it."""
        texts = [model.to_tokens(text, prepend_bos=True)[0] for text, _ in asked]
        answers = [int(model.to_tokens(" " + answer, prepend_bos=False)[0, 0]) for _, answer in asked]
        length = max(map(len, texts))
        padded = [torch.cat([text[:1].expand(length - len(text)), text]) for text in texts]
        return cls(torch.stack(padded), torch.tensor(answers, device=padded[0].device))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "Questions":
        return Questions(self.tokens[rows], self.answers[rows])

    @torch.no_grad()
    def log_p(self, model: Any, hooks: Sequence[Hook] = ()) -> Float[Tensor, "N v"]:
        """Log-probabilities of the next token."""
        lots = self.tokens.split(AT_ONCE) if len(self) else ()
        return torch.cat(
            [
                torch.empty(0, model.cfg.d_vocab, dtype=torch.float32, device=self.tokens.device),
                *(model.run_with_hooks(lot, fwd_hooks=list(hooks))[:, -1].log_softmax(-1) for lot in lots),
            ]
        )

    def probabilities(self, model: Any, hooks: Sequence[Hook] = ()) -> Float[Tensor, " N"]:
        return self.log_p(model, hooks).gather(1, self.answers[:, None])[:, 0].exp()

    def accuracy(self, model: Any, hooks: Sequence[Hook] = ()) -> float:
        return self.scored(model, hooks)[1]

    def scored(self, model: Any, hooks: Sequence[Hook] = ()) -> tuple[float, float]:
        """Mean probability of the answers, and how many of them are the likeliest token."""
        log_p = self.log_p(model, hooks)
        return float(log_p.gather(1, self.answers[:, None]).exp().mean()), float((log_p.argmax(-1) == self.answers).float().mean())


@dataclass(frozen=True)
class Drift:
    """KL(original ‖ changed) on text, in nats per position."""

    mean: float
    p99: float


@torch.no_grad()
def drift(model: Any, text: Int[Tensor, "N s"], hooks: Sequence[Hook], original: Float[Tensor, "N s v"] | None = None) -> Drift:
    before: Tensor = model(text) if original is None else original
    kl = kl_divergence(before, model.run_with_hooks(text, fwd_hooks=list(hooks))).flatten()
    return Drift(float(kl.mean()), float(kl.quantile(0.99)))
