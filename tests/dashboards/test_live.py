from pathlib import Path

import pandas as pd
import pytest

from dashboards import frames
from dashboards.live import Watch
from nas.errors import StoreError
from nas.store import Store

OBJECTIVES = ("bits_per_byte", "flops_per_token")


def from_scratch(writer) -> pd.DataFrame:
    return frames.trial_frame(writer.store.trials(writer.study), writer.store.reports(writer.study), OBJECTIVES)


def watch(writer) -> Watch:
    return Watch(writer.store.url.database)


def test_a_study_taken_in_bit_by_bit_equals_one_read_at_once(writer):
    looking = watch(writer)
    for step in range(12):
        if step % 4 == 3:
            writer.fail()
        else:
            writer.complete(5 - (step * 7 % 5) * 0.3, 1e6 * (1 + step % 3), rungs=step % 3)
        number, token = writer.lease()
        writer.report(number, token, 0, 4.0)
        if step % 2:
            pd.testing.assert_frame_equal(looking.study("first").frame, from_scratch(writer), check_like=True)
    live = looking.study("first")
    expected = frames.hypervolume_frame(writer.store.hypervolumes(writer.study), live.frame)
    pd.testing.assert_frame_equal(live.hypervolumes(), expected)
    pd.testing.assert_frame_equal(live.curves(range(100)), frames.curve_frame(writer.store.reports(writer.study)))


def test_a_look_reads_only_what_changed_since_the_last(small, monkeypatch):
    read = []
    for name in ("trials", "reports", "hypervolumes"):
        original = getattr(Store, name)

        def counted(self, *args, original=original, **kwargs):
            rows = original(self, *args, **kwargs)
            read.append(len(rows))
            return rows

        monkeypatch.setattr(Store, name, counted)
    looking = watch(small)
    looking.study("first")
    assert read == [5, 7, 3]
    read.clear()
    looking.study("first")
    assert read == [0]
    small.complete(2.0, 1e6, rungs=2)
    read.clear()
    looking.study("first")
    assert read == [1, 2, 1]


def test_a_missing_file_is_waited_for_and_never_created(tmp_path: Path, write_in):
    path = tmp_path / "later.db"
    looking = Watch(str(path))
    assert (looking.store(), looking.names(), looking.study("first")) == (None, [], None)
    assert list(tmp_path.iterdir()) == []
    with Store(str(path), create=True) as store:
        write_in(store, "first").complete(3.0, 1e6)
        assert looking.names() == ["first"]
        assert len(looking.study("first").frame) == 1
    looking.close()


def test_a_deleted_study_is_gone_and_its_successor_of_the_same_name_is_new(small, write_in):
    looking = watch(small)
    assert len(looking.study("first").frame) == 5
    small.store.delete_study("first")
    assert looking.study("first") is None
    write_in(small.store, "first").complete(3.0, 1e6)
    assert len(looking.study("first").frame) == 1


def test_a_store_that_can_never_be_opened_is_an_error(tmp_path: Path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 10)
    for url in (str(tmp_path / "no" / "nas.db"), "mysql://x/y", str(tmp_path / "text.db")):
        with pytest.raises(StoreError):
            Watch(url)
