"""What is looked for in rows: a file for each check, and the table of their settings, in the order of their acts."""

from .boilerplate import Boilerplate
from .check import Check
from .encoding import Encoding
from .exact_duplicates import ExactDuplicates
from .language import Language
from .length import Length
from .near_duplicates import NearDuplicates
from .overlap import Overlap
from .personal_data import PersonalData
from .secrets import Secrets
from .structure import Structure

CHECKS: dict[str, type[Check]] = {
    check.model_fields["kind"].default: check
    for check in (
        Structure,
        Encoding,
        Secrets,
        PersonalData,
        Boilerplate,
        Language,
        Length,
        Overlap,
        ExactDuplicates,
        NearDuplicates,
    )
}
