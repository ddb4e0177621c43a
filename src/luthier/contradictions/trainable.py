"""What does not go together with what moves: adapters, those beneath, and layers that move later."""

from __future__ import annotations

from ..errors import AdapterError
from ..fields import Config
from ..trainable import Partial, Selection, adapter_files
from ..trainable.adapter import Adapting, BesideLayers


def problems(config: Config) -> list[str]:
    t, recomputed, found = config.trainable, config.parallel.activation_checkpointing, []
    if isinstance(t, Partial):
        found += _of_unfreezing(t, config.max_steps)
    if isinstance(t, Adapting):
        found += t.problems()
    if t.kind == "prefix" and recomputed and not config.batch.packing:
        found.append(
            f"parallel.activation_checkpointing={recomputed}: with batch.packing=false a prefix lies in the cache, "
            "which layers that are recomputed do without: use one of the two"
        )
    return found + _of_adapters(config)


def _of_unfreezing(trainable: Partial, max_steps: int | None) -> list[str]:
    kinds = ", ".join(Selection.model_fields)
    found = [f"trainable: nothing would move in the first step; give one of {kinds}"] if trainable.empty else []
    before = 0
    for i, entry in enumerate(trainable.unfreeze):
        place = f"trainable.unfreeze[{i}]"
        if entry.empty:
            found.append(f"{place}: nothing is named to move from step {entry.step} on; give one of {kinds}")
        if entry.step <= before:
            found.append(f"{place}.step={entry.step} does not come after {before}: list the entries by rising steps")
        if max_steps is not None and entry.step >= max_steps:
            found.append(f"{place}.step={entry.step} is never reached in max_steps={max_steps}: use a smaller step")
        before = entry.step
    return found


def _of_adapters(config: Config) -> list[str]:
    """What is wrong with saved adapters: those beneath what is trained, and the one that a run goes on with."""
    found = adapter_files.problems(config.trainable)
    entries = config.model.beneath
    for entry in entries:
        try:
            saved = adapter_files.read(entry.path)
        except AdapterError as error:
            found.append(f"model.adapters: {error}")
            continue
        if not entry.share:
            found.append(f"model.adapters: share=0 of {entry.path!r} leaves nothing of it: leave the adapter out")
        elif entry.share != 1 and not isinstance(saved.settings, BesideLayers):
            found.append(
                f"model.adapters: share={entry.share:g} of {entry.path!r}, but virtual tokens are there or not: leave "
                "share out"
            )
    called = [entry.name for entry in entries]
    if twice := sorted({str(name) for name in called if called.count(name) > 1}):
        found.append(f"model.adapters: two adapters of the name {twice[0]!r}: give one of them another `name`")
    if "default" in called:
        found.append("model.adapters: the name 'default' is that of the adapter that is trained: give another `name`")
    if entries and not isinstance(config.trainable, Adapting):
        found.append(
            f"model.adapters lie frozen beneath a new adapter, and method={config.method} trains the model itself: "
            "merge them into it first (luthier.adapters.merge), or use method=lora"
        )
    if entries and config.model.starts_at_random:
        found.append("model.adapters of a random start: an adapter belongs to loaded weights; leave one of them out")
    return found
