"""TensorBoard: event files in `tensorboard/` of the run's folder; `tensorboard --logdir RUN/tensorboard` shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .trackers import About, Histogram, table


class TensorBoard:
    rewinds = True  # by `purge_step`

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        self.settings = about.settings
        begin = about.resumed_at + 1 if about.resumed_at else 0
        folder = about.folder / "tensorboard"
        _wait_for_a_later_name(folder)
        self.writer: Any = SummaryWriter(str(folder), purge_step=begin)

    @staticmethod
    def new_id(about: About) -> str:
        return "tensorboard"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def samples(self, step: int, rows: Sequence[Mapping]) -> None:
        columns, cells = table(rows)
        lines = [columns, ["---"] * len(columns), *cells]
        markdown = "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)
        self.writer.add_text("answers", markdown, step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        for key, h in found.items():
            self.writer.add_histogram_raw(
                key, min=h.edges[0], max=h.edges[-1], num=sum(h.counts), sum=h.total, sum_squares=h.squares,
                bucket_limits=h.edges[1:], bucket_counts=h.counts, global_step=step,
            )  # fmt: skip

    def confusion(self, step: int, names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
        """A picture, and which label each number in it is."""
        from tensorboard.compat.proto import summary_pb2

        from .picture import confusion, png

        made: Any = summary_pb2
        drawn = confusion(counts)
        height, width, _ = drawn.shape
        image = made.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(drawn))
        summary = made.Summary(value=[made.Summary.Value(tag="evaluation/confusion", image=image)])
        self.writer._get_file_writer().add_summary(summary, step)
        told = "\n".join(f"{i}. {_cell(name)}" for i, name in enumerate(names))
        self.writer.add_text("confusion/labels", f"rows are true labels, columns what is said\n\n{told}", step)

    def finish(self, figures: Mapping[str, float]) -> None:
        """The table of the hyper-parameters' tab."""
        from torch.utils.tensorboard.summary import hparams

        named = {f"final/{key}": value for key, value in figures.items()}
        for summary in hparams(dict(self.settings), named):
            self.writer._get_file_writer().add_summary(summary)
        for key, value in named.items():
            self.writer.add_scalar(key, value)

    def close(self) -> None:
        self.writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """At most a second: event files are read in the order of their names, which begin with whole seconds.

    Of two in one second the process number decides, as text, and what a resumed run takes back would be read last.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and max(seconds) == int(time.time()):
        time.sleep(0.02)


def _cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")


TRACKER = TensorBoard
