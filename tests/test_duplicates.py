"""The checks of near duplicates and of overlap with evaluation sets, on rows in files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
from pydantic import ValidationError

from luthier.data import sources
from luthier.errors import ConfigError, DataError
from luthier.prepare import audit as auditing
from luthier.prepare import cleaning_of  # noqa: F401
