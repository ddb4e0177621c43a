"""How likely a language model finds what is learnt of rows: sums of log-probabilities, many rows at a time, packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ..assemble import quietly
from ..batch import Batch, rectangles
from ..document import Document
from ..errors import ModelError
from ..logprobs import scored
from ..models import Model, load, names, network, trials
from ..parallel import Parallel
from ..parallel.ranks import Ranks
from ..precision import AsLoaded
from .pieces import Say
from .views import View

MICRO_TOKENS = 4096  # of documents that run together
LEARNT = ("assistant", "text")
BETWEEN = "\n\n"  # of texts of a row


class Likelihood:
    """A causal model as it is, without training and without a chat template."""

    def __init__(self, name: str, tokenizer: str, max_length: int, say: Say = lambda text: None):
        quietly()
        self.tokenizer: Any = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        device = Ranks(Parallel()).device
        model = names.resolved(Model(name=name))
        made: Any = load.load_model(model, AsLoaded().resolve(device), device)
        load.check_context(made, max_length, say)
        self.network = network.Network(made)
        trials.check_causal(self.network)
        trials.check_head(self.network)
        trials.prepare(self.network, model.attention)
        self.network.longest = max_length
        self.network.requires_grad_(False).eval()
        if (size := self.tokenizer.get_vocab_size()) > len(made.get_input_embeddings().weight):
            raise ModelError(f"model={name}: its tokenizer has {size:,} tokens, more than its embeddings")

    @torch.no_grad()
    def __call__(self, views: Sequence[View]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row the negative log-likelihood of what is learnt [N] float64, its tokens and its bytes [N] int64.

        The first tokens of a row without a beginning that the tokenizer adds are predicted by nothing, and not counted.
        """
        documents, sizes = self._documents(views)
        lengths = [document.inputs for document in documents]
        total, count = np.zeros(len(views)), np.zeros(len(views), np.int64)
        order = [i for i in sorted(range(len(lengths)), key=lengths.__getitem__) if documents[i].weights.any()]
        for part in rectangles(order, lengths, MICRO_TOKENS):
            if part:
                batch = Batch.pack([documents[i] for i in part]).to(self.network.device)
                hidden = self.network.hidden(batch)[batch.trained]
                logs, _ = scored(hidden, self.network.head, batch.targets[batch.trained])
                of = np.searchsorted(batch.ends, batch.trained.cpu().numpy(), side="right") - 1
                total[part] = np.bincount(of, -logs.double().cpu().numpy(), minlength=len(part))
                count[part] = np.bincount(of, minlength=len(part))
        return total, count, np.array(sizes, np.int64)

    def _documents(self, views: Sequence[View]) -> tuple[list[Document], list[int]]:
        """Tokens with weights, and how many bytes of UTF-8 those with a weight are of."""
        texts, spans = zip(*(_joined(view) for view in views)) if views else ((), ())
        made, sizes = [], []
        for number, (coded, learnt) in enumerate(zip(self.tokenizer.encode_batch(list(texts)), spans)):
            tokens = np.array(coded.ids, np.int32)
            starts, stops = np.array(coded.offsets, np.int64).reshape(-1, 2).T
            weights = np.zeros(len(tokens), np.float32)
            for first, last in learnt:
                weights[(starts >= first) & (starts < last)] = 1
            weights[np.array(coded.special_tokens_mask, bool)] = 0
            weights[:1] = 0
            made.append(Document(tokens, weights, number))
            runs = _inside(starts, weights, learnt)
            sizes.append(sum(_bytes(texts[number], starts[here], stops[here]) for here in runs))
        return made, sizes


def _inside(starts: np.ndarray, weights: np.ndarray, learnt: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Of each span that is learnt, its tokens that count."""
    for first, last in learnt:
        yield (weights > 0) & (starts >= first) & (starts < last)


def _bytes(text: str, starts: np.ndarray, stops: np.ndarray) -> int:
    """Of a run of tokens. Of those that share a character, each has the whole of it as its place."""
    return len(text[starts[0] : stops[-1]].encode()) if len(starts) else 0


def _joined(view: View) -> tuple[str, list[tuple[int, int]]]:
    """All texts in a row but rejected answers, and where in it those stand that are learnt: all, where none is."""
    whole, spans, at = [], [], 0
    for text in view.texts:
        if text.role != "rejected":
            whole.append(text.text)
            spans.append((text.role, at, at + len(text.text)))
            at += len(text.text) + len(BETWEEN)
    learnt = [(a, b) for role, a, b in spans if role in LEARNT] or [(a, b) for _, a, b in spans]
    return BETWEEN.join(whole).encode("utf-8", "replace").decode(), learnt
