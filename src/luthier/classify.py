"""Labels of texts, and tags of their words, by a trained model: with probabilities, as it was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import labels
from .batch import Batch, rectangles
from .data import labelled
from .data.conversations import BadRow, Conversation, said
from .data.masks import Rendered, Renderer
from .document import Document
from .errors import DataError
from .models.network import Network

PAIR = "\t"  # between the two texts of a pair


class Classifier:
    """A model that gives texts their labels. `chat` says that texts are written through the chat template."""

    def __init__(self, network: Network, renderer: Renderer, chat: bool = False, micro_tokens: int = 4096):
        self.network, self.renderer, self.chat, self.micro_tokens = network, renderer, chat, micro_tokens

    def __call__(self, *texts: str) -> list[dict[str, Any]]:
        """What is said of each text; the two texts of a pair have a tab between them.

        One label: `label`, its `probability`, and those of all. Several: the `labels` above one half. A `value`. Tags:
        a (word, tag, probability) each, and the entities that they name.
        """
        return self._tags(texts) if self.network.ends_in == "each" else self._labels(texts)

    def _labels(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        scores = self._scores([self._rendered(text) for text in texts])
        return [self._told(text, of_text) for text, of_text in zip(texts, scores)]

    def _told(self, text: str, scores: Tensor) -> dict[str, Any]:
        names, problem = self.renderer.labels, self.renderer.problem
        if problem == labels.VALUE:
            return {"text": text, "value": scores[0].item()}
        if problem == labels.SEVERAL:
            found = dict(zip(names, scores.sigmoid().tolist()))
            return {"text": text, "labels": [n for n, p in found.items() if p > 0.5], "probabilities": found}
        found = dict(zip(names, scores.softmax(-1).tolist()))
        best = max(found, key=found.__getitem__)
        return {"text": text, "label": best, "probability": found[best], "probabilities": found}

    def _tags(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        words = [text.split() for text in texts]
        made = [
            self._explained(text, lambda of=of: labelled.untagged(self.renderer, of)) for text, of in zip(texts, words)
        ]
        names, out = self.renderer.labels, []
        found = self._scores([one for one, _ in made])
        for text, of_text, (_, firsts), scores in zip(texts, words, made, found):
            tags = []
            for word, probabilities in zip(firsts, scores.softmax(-1)):
                if word is not None:
                    probability, place = probabilities.max(-1)
                    tags.append((of_text[word], names[int(place)], probability.item()))
            spans = labels.entities([tag for _, tag, _ in tags]) if labels.entity_kinds(names) else []
            entities = [{"kind": kind, "text": " ".join(of_text[a:b]), "words": [a, b]} for kind, a, b in spans]
            out.append({"text": text, "tags": tags, "entities": entities})
        return out

    def _rendered(self, text: str) -> Rendered:
        turns = [said("user", part)[0] for part in ([text] if self.chat else text.split(PAIR, 1))]
        row = Conversation(turns, plain=not self.chat)
        return self._explained(text, lambda: labelled.unlabelled(self.renderer, row))

    def _explained(self, text: str, make: Any) -> Any:
        try:
            return make()
        except BadRow as fault:
            raise DataError(f"{text[:60]!r}: {fault.detail}") from None

    @torch.no_grad()
    def _scores(self, rows: Sequence[Rendered]) -> list[Tensor]:
        """[K] of each text, or [L, K] of its tokens."""
        documents: list[Document] = []
        for number, made in enumerate(self.renderer.documents(list(enumerate(rows)))):
            if isinstance(made, BadRow):
                raise DataError(f"text {number}: {made.detail}")
            documents += made
        lengths = [document.inputs for document in documents]
        out: list[Tensor] = [torch.empty(0)] * len(documents)
        self.network.eval()
        for part in rectangles(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, self.micro_tokens):
            if not part:
                continue
            batch = Batch.pack([documents[i] for i in part]).to(self.network.device)
            scores = self.network.scores(batch).float().cpu()
            of_rows = scores.split(batch.lengths) if self.network.ends_in == "each" else scores
            for i, found in zip(part, of_rows):
                out[i] = found
        return out
