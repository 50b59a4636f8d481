from __future__ import annotations

import json
from pathlib import Path

import pytest
from remote_folder import RemoteFolder
from servers import upload
from tarfiles import contents, write_tar

from gigabatch.data.packing.pack import pack
from gigabatch.data.shards.filtered_view import create_view
from gigabatch.data.shards.indexing import open_index


@pytest.mark.slow
def test_pack_bucket_folder_and_its_filtered_view(s3: RemoteFolder, tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / "set" / f"{name}.tar", {f"{name}.txt": name.encode()})
    bucket = s3.url.removeprefix("s3://").partition("/")[0]
    upload(s3.server, tmp_path / "set", bucket, "words")
    url = f"s3://{bucket}/words"
    pack(url, tmp_path / "all")
    assert contents(tmp_path / "all" / "all-000000.tar") == {"a.txt": b"a", "b.txt": b"b"}
    create_view(open_index(url), "key == 'b'", tmp_path / "view")
    view = json.loads((tmp_path / "view" / "manifest.json").read_text())["view"]
    assert view == {"source": url, "where": "key == 'b'"}
    pack(tmp_path / "view", tmp_path / "some")
    assert contents(tmp_path / "some" / "some-000000.tar") == {"b.txt": b"b"}
