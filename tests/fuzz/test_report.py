"""The report of a campaign that ran in parts: sums, numbers, what is rare, what failed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from aios_compile.cli.output import plain
from aios_compile.study.fuzz.campaign import PASSES, Failure, Tally, passes_of
from aios_compile.study.fuzz.report import main, rare


def test_parts_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = Counter(dict.fromkeys(passes_of("cpp"), 30))
    tallies = [
        Tally("cpp", 0, (0, 1996), 1000, every, Counter({"use normed": 2})),
        Tally("cpp", 0, (1, 1997), 1000, every - Counter({"merge_qkv": 25}), Counter()),
        Tally("cpp", 0, (3000, 3999), 500, refused=Counter({"CodegenError: no emitter": 3})),
        Tally("triton", 7, (0, 9), 10, failures=[Failure(7, 4, "wrong: output 0\nmore", "f.py")]),
    ]
    for i, tally in enumerate(tallies):
        (tmp_path / f"{i}.json").write_text(json.dumps(plain(tally)))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "running.json").write_text("")
    main(str(tmp_path))
    text = capsys.readouterr().out
    cpp, triton = text.split("### triton")
    assert "cpp: 2,500 examples in 3 parts" in cpp and "seed 0: 0-1997, 3000-3999" in cpp
    assert "| merge_qkv | 35 |" in cpp and cpp.count("| 60 |") == len(passes_of("cpp")) - 1
    assert "Below 50 in 5,000: none." in cpp and "refused 3: CodegenError: no emitter" in cpp
    assert "number 4 of seed 7: wrong: output 0\n" in triton and "10 examples" in triton
    assert all(name in cpp for name in PASSES)
    own = Counter(fuse_norm_into_linear=50, fuse_kv_write_into_attention=49)
    assert rare("triton", own, 1000) == {"fuse_kv_write_into_attention": 49}
    (tmp_path / "3.json").unlink()
    (tmp_path / "1.json").unlink()
    (tmp_path / "2.json").write_text(json.dumps(plain(Tally("cpp", 0, (0, 9), 3000))))
    main(str(tmp_path))
    assert "merge_qkv 30" in capsys.readouterr().out
