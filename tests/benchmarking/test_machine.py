"""What a record says of the machine and of the code."""

from __future__ import annotations

from kaleido_fast.benchmarking import machine


def test_commit_is_that_of_the_tracked_package_only(tmp_path):
    package = tmp_path / "site" / "kaleido_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert machine.source_commit(package) == (None, None)
    assert machine.command_line(["/x/kaleido_fast/__main__.py", "bench", "--net", "a b"]) == (
        "kaleido-fast bench --net 'a b'"
    )
