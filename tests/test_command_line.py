"""What a program says of slips in its config: one message, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from absl import flags
from doc_blocks import ROOT
from ml_collections import config_flags

from medmoe_jax import command_line
from medmoe_jax.config import RunConfig
from medmoe_jax.experiments.config import StudyConfig

# Of ml_collections' loader.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
STAGE3 = f"--config={ROOT}/configs/stage3.py:tiny"


@pytest.fixture
def config_flag() -> Iterator[None]:
    """The flag as programs define it; it goes again, with those that it makes."""
    before = set(flags.FLAGS)
    config_flags.DEFINE_config_file("config", help_string="A file of configs/")
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{STAGE3[:-4]}huge"], "error: unknown model size 'huge'; use one of phi2, "),
        (["--config=none.py"], "error: --config none.py cannot be read ([Errno 2] No such file"),
        (
            [STAGE3, "--config.optim.learning=1"],
            "error: --config.optim.learning: config.optim has no field 'learning'; it has lr, ",
        ),
        (
            [STAGE3, "--config.data.bucket=(1,)"],
            "config.data has no field 'bucket' (did you mean 'buckets'?); it has files, ",
        ),
        ([STAGE3, "--config.optim.lr=high"], "error: flag --config.optim.lr=high: could not"),
        ([STAGE3, "--confg.optim.lr=1"], "Unknown command line flag 'confg.optim.lr'"),
    ],
)
@pytest.mark.usefixtures("config_flag")
def test_slips_end_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda _: pytest.fail("the program ran"))
    assert message in str(ended.value) and "Traceback" not in str(ended.value)


@pytest.mark.usefixtures("config_flag")
def test_a_config_without_slips_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [STAGE3, "--config.model.moe.top_k=2", "--config.data.files=a.json", "word"]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    found = []
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda rest: found.append((rest[1:], flags.FLAGS.config)))
    ((rest, config),) = found
    assert ended.value.code is None and rest == ["word"]
    assert config.model.moe.top_k == 2 and config.data.files == ("a.json",)


def test_fields_are_looked_up_in_the_config_of_the_program() -> None:
    assert command_line.field_fault("--config.phi.stage3.optim.lr=1", StudyConfig) == ""
    fault = command_line.field_fault("--config.phi.stage3.optim.rate", StudyConfig)
    assert fault.startswith("--config.phi.stage3.optim.rate: config.phi.stage3.optim has no field")
    assert "has no field 'phi'" in command_line.field_fault("--config.phi.x=1", RunConfig)
    assert command_line.field_fault("--config.train.x=1", RunConfig) == ""
    assert command_line.field_fault("--workdir=config.x", RunConfig) == ""
