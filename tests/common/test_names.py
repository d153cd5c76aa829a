"""Names from files: one plain component, or a path that stays in its folder."""

import pytest

from electra_ds.common.errors import UserError
from electra_ds.common.names import check_inside, check_name, check_relative

LEAVING = ["..", ".", "", "/etc/passwd", "../x", "a/../../x", "a//b", "C:x", "a\\b", "a\0", "a\nb"]
LEAVING += ["x" * 256, " a", "a\u202eb", None, 3, ["a"]]


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_is_not_plain_is_refused(name):
    for check in (check_name, check_relative):
        with pytest.raises(UserError, match=r"f\.json: key: .*expected a plain file name"):
            check(name, "f.json: key", "a name of a shard")


def test_plain_names_stay():
    for name in ("train-00000.tar", "日本語", ".hidden", "a b"):
        assert check_name(name, "f.json", "a name") == name
    assert check_relative("train/00000.tar", "f.json", "a file") == "train/00000.tar"


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "good").write_text("")
    (folder / "link").symlink_to("/etc/passwd")
    assert check_inside(folder / "good", folder, "d") == folder / "good"
    with pytest.raises(UserError, match="leads out of"):
        check_inside(folder / "link", folder, "d")
