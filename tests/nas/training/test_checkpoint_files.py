"""Where checkpoints lie, without their tensors."""

from pathlib import Path

import pytest

from hypernas.errors import UserError
from hypernas.training.checkpoint_files import open_folder


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--checkpoints"):
        open_folder(str(tmp_path / "file" / "checkpoints"))
