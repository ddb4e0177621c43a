"""How new rows are made of given ones: a file for each way, and the table of their settings."""

from .characters import Characters
from .paraphrase import Paraphrase
from .preferences import Preferences
from .self_instruct import SelfInstruct
from .synonyms import Synonyms
from .way import Way
from .words import Words

WAYS: dict[str, type[Way]] = {
    way.model_fields["kind"].default: way
    for way in (Characters, Words, Synonyms, Paraphrase, SelfInstruct, Preferences)
}  # fmt: skip
