"""What does not go together in the rows and in how they reach the loop, and files that are not there."""

from __future__ import annotations

from ..data import Data, sources
from ..fields import Config


def problems(config: Config, weights: bool = True, training: bool = True) -> list[str]:
    data, found = config.data, []
    for columns in [data.columns, *(source.columns or {} for source in data.sources())]:
        if columns:
            from ..data import formats

            if problem := formats.wrong_columns(columns):
                found.append(problem)
    found += [*_of_formats(config), *_of_scores(config), *(missing(config) if training else [])]
    return found + (_of_sources(config) if weights or data.sources() else [])


def missing(config: Config) -> list[str]:
    """Files of rows that are not there."""
    data = config.data
    named = [("data.train", source.path) for source in data.sources()]
    named += [("data.validation", data.validation)] if isinstance(data.validation, str) else []
    paths = [(key, name) for key, path in named for name in ([path] if isinstance(path, str) else path)]
    return [f"{key}: {problem}" for key, name in paths if (problem := sources.missing(name))]


def _of_formats(config: Config) -> list[str]:
    """A format that is named must be one of the rows that the objective learns from."""
    found, kind = [], config.objective.rows
    for name in dict.fromkeys([config.data.format, *(source.format for source in config.data.sources())]):
        if name in (None, "auto"):
            continue
        from ..data import formats

        if formats.FORMATS[name] not in formats.of_kind(kind):
            fitting = ", ".join(["auto", *(form.name for form in formats.of_kind(kind))])
            found.append(f"data.format={name} is not for method={config.method}: use {fitting}")
    return found


def _of_scores(config: Config) -> list[str]:
    """What goes with a network that ends in scores of texts or tokens, and what with one that predicts tokens."""
    found, data, ends_in = [], config.data, config.objective.ends_in
    has_labels = config.objective.rows in ("labelled", "tagged")
    if has_labels and data.long_text == "split":
        found.append(
            "data.long_text=split would give the label of a text to each of its pieces: use data.long_text=cut, or "
            "data.long_text=error"
        )
    if data.long_text == "cut" and not has_labels:
        found.append("data.long_text=cut is for texts with labels; others lose what is learnt: leave it out")
    if ends_in == "tokens":
        return found
    if config.evaluation.generate:
        found.append(
            f"evaluation.generate={config.evaluation.generate}: this model gives scores, not answers: leave it out"
        )
    if config.evaluation.forgetting:
        found.append("evaluation.forgetting: this model does not predict tokens, so it has no such loss: leave it out")
    if config.evaluation.tasks:
        found.append("evaluation.tasks need a model that predicts tokens: leave them out")
    if data.streaming and config.objective.asks_labels:
        found.append(
            "data.streaming=true: labels cannot be told from rows that are read as they are learnt: give "
            "objective.labels, and objective.problem_type"
        )
    return found


def _of_sources(config: Config) -> list[str]:
    """What does not go together in how rows reach the loop."""
    data, found = config.data, []
    entries = data.sources()
    if not entries:
        found.append("data.train=[]: name at least one source")
    weighted = [entry for entry in entries if entry.weight is not None]
    if weighted and len(weighted) < len(entries):
        without = next(entry for entry in entries if entry.weight is None)
        found.append(f"data.train: {without.path!r} has no weight and others have: give all sources one, or none")
    elif weighted and min(e.weight or 0 for e in entries) < 1e-6 * sum(e.weight or 0 for e in entries):
        found.append("data.train: a weight is less than a millionth of all: leave that source out, or give it more")
    if weighted and data.limit is not None:
        found.append(f"data.limit={data.limit} with weights would cut the first sources only: give each its own limit")
    if data.cache is False and data.cache_dir is not None:
        found.append(f"data.cache=false keeps nothing in data.cache_dir={data.cache_dir!r}: leave one of them out")
    if not data.streaming:
        if data.shuffle_buffer != Data.model_fields["shuffle_buffer"].default:
            found.append(
                f"data.shuffle_buffer={data.shuffle_buffer} is of streams, and without one all rows are shuffled: "
                "leave it out, or set data.streaming=true"
            )
        return found
    if config.model.tokenizer == "train" and isinstance(data.validation, int | float):
        found.append(
            f"data.validation={data.validation} of a stream, and model.tokenizer=train: held-out text must not be seen "
            "by the tokenizer; give the held-out rows as a file"
        )
    if config.max_steps is None:
        found.append("data.streaming=true has no end that is known beforehand: give max_steps")
    if data.cache is True:
        found.append("data.cache=true with data.streaming=true: a stream keeps no tokens; leave one of them out")
    if data.limit is not None or any(entry.limit is not None for entry in entries):
        found.append("data.limit with data.streaming=true: use max_steps to learn less of a stream")
    if config.batch.examples is not None and data.shuffle_buffer < config.batch.examples:
        found.append(
            f"data.shuffle_buffer={data.shuffle_buffer} is less than batch.examples={config.batch.examples}, so no "
            "step would be full: use a larger buffer"
        )
    return found
