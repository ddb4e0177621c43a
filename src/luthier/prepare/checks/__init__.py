"""What is looked for in rows: a file for each check, and the table of their settings, in the order of their acts."""

from .balance import Balance
from .boilerplate import Boilerplate
from .check import Check
from .encoding import Encoding
from .exact_duplicates import ExactDuplicates
from .label_noise import LabelNoise
from .language import Language
from .length import Length
from .near_duplicates import NearDuplicates
from .overlap import Overlap
from .perplexity import Perplexity
from .personal_data import PersonalData
from .secrets import Secrets
from .structure import Structure

CHECKS: dict[str, type[Check]] = {
    check.model_fields["kind"].default: check
    for check in (
        Structure,
        LabelNoise,  # before others change texts, by which its corrections are found
        Balance,
        Encoding,
        Secrets,
        PersonalData,
        Boilerplate,
        Language,
        Length,
        Perplexity,
        Overlap,
        ExactDuplicates,
        NearDuplicates,
    )
}
