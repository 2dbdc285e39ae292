"""Images and methods of the models' tests."""

from ..models.conftest import images, method  # noqa: F401  fixtures
