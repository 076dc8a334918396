"""What holds in every test: one thread, and asserts of the helpers that say what they compared."""

import pytest

pytest.register_assert_rewrite("helpers")

from helpers.strategies import one_thread as one_thread  # noqa: E402
