"""The exceptions that Luthier raises for what a user can mend, and the exit code of each.

    LuthierError                1
    ├── ConfigError             2   a key, a value or a combination of them
    ├── DataError               3   a file or a row
    ├── ModelError              4   weights, tokenizer or template of the base model
    │   └── AdapterError        4   a saved adapter: damaged, unknown, or of another base
    ├── CheckpointError         5   nothing to resume from, or not from there
    ├── NonFiniteError          6   a loss or a gradient that is not a number
    ├── ExportError             7   what was written does not answer as what was trained
    ├── MetricError             1   a user's metric that fails or gives no number
    ├── RewardError             1   a reward that fails, takes too long or gives no number, with its row
    ├── SearchError             1   a search without one trial that succeeded
    ├── UploadError             1   a hub that cannot be reached, refuses, or has other bytes afterwards
    └── Interrupted       130, 143  Ctrl-C, SIGTERM: saved, start again to go on

A message names the field, the value and the remedy. Our own mistakes are `assert`s, never these.
"""


class LuthierError(Exception):
    """Base of all; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(LuthierError):
    """One or more things wrong with a configuration, all listed in `problems`."""

    exit_code = 2

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the configuration:\n"
        super().__init__(head + "\n".join(("  " if head else "") + problem for problem in self.problems))


class DataError(LuthierError):
    exit_code = 3


class ModelError(LuthierError):
    exit_code = 4


class AdapterError(ModelError):
    """A saved adapter that cannot be read, or does not fit the model at hand."""


class CheckpointError(LuthierError):
    exit_code = 5


class NonFiniteError(LuthierError):
    exit_code = 6


class ExportError(LuthierError):
    exit_code = 7


class MetricError(LuthierError):
    """A user's function that scores answers failed, or gave no finite number."""


class RewardError(LuthierError):
    """A reward could not be given to an answer; never a zero in its place."""


class SearchError(LuthierError):
    """No trial of a search came to its end, so there is nothing to choose from."""


class UploadError(LuthierError):
    """A hub did not take what was sent, or does not have it as it is here."""


class Interrupted(LuthierError):
    """The run was asked to stop; it saved a checkpoint first."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


EXIT_CODES = {
    0: "success",
    1: "any other error that Luthier explains",
    2: "the command line or the configuration",
    3: "data: a file or a row",
    4: "the base model: weights, tokenizer, chat template",
    5: "a checkpoint: none that is whole, or one of another run",
    6: "a loss or a gradient is not finite",
    7: "an export that does not answer as what was trained",
    8: "an audit found more than its recipe allows",
    130: "Ctrl-C: a checkpoint was saved, the same command goes on",
    143: "SIGTERM: a checkpoint was saved, the same command goes on",
}
