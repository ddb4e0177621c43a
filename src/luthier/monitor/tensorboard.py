"""TensorBoard: event files in `tensorboard/` of the run's folder; `tensorboard --logdir RUN/tensorboard` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .trackers import About, Histogram, table


class TensorBoard:
    rewinds = True  # by `purge_step`

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        self.settings = about.settings
        begin = about.resumed_at + 1 if about.resumed_at else 0
        self.writer: Any = SummaryWriter(str(about.folder / "tensorboard"), purge_step=begin)

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


def _cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")


TRACKER = TensorBoard
