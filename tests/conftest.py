"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# A busy machine is no failure; and what fails in CI has to fail again on the next run.
settings.register_profile("m3", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("m3")

# A hook of git's sets these, and the tests' own repositories must not be taken for that one.
for _name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[_name]
os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
