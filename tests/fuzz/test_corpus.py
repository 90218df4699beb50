"""The committed inputs of the fuzz targets, without a fuzzer: each is run once."""

import pytest

import fuzz
from fuzz.run import replay

INPUTS = {name: sorted((fuzz.CORPUS / name).iterdir()) for name in fuzz.NAMES}


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_the_property_holds_for_every_input_of_the_corpus(name, caplog):
    assert INPUTS[name]
    with fuzz.target(name) as check:
        for file in INPUTS[name]:
            try:
                check(file.read_bytes())
            except Exception as error:
                error.add_note(f"make fuzz REPLAY={file}")
                raise
    caplog.clear()  # lines hold exceptions, and these the files that they were about


def test_the_corpus_is_small():
    assert sum(file.stat().st_size for files in INPUTS.values() for file in files) < 200_000


def test_an_input_is_run_again_by_the_target_whose_folder_it_is_in(tmp_path, capsys):
    replay(INPUTS["routes"][0])
    assert "the property of routes holds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of no target"):
        replay(tmp_path / "x")
