"""The configurations for ``accelerate launch`` are read by accelerate as they are meant; nothing is launched."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(file: Path) -> Any:
    """The arguments that ``accelerate launch`` makes of a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


@pytest.fixture
def plugin_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(file: Path) -> FullyShardedDataParallelPlugin:
        for key, value in prepare_multi_gpu_env(read(file)).items():
            if key.startswith("FSDP"):
                monkeypatch.setenv(key, value)
        return FullyShardedDataParallelPlugin()

    return made


def test_there_is_one_for_each_way() -> None:
    assert CONFIGS == ["ddp", "fsdp2", "zero2"]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_read(name: str) -> None:
    arguments = read(FOLDER / f"{name}.yaml")
    ways = (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed)
    assert ways == (name == "ddp", name == "fsdp2", name == "zero2")
    assert arguments.mixed_precision == "no" and arguments.num_processes == 8
    assert (
        (FOLDER / f"{name}.yaml")
        .read_text()
        .startswith(f"# accelerate launch --config_file examples/accelerate/{name}.yaml ")
    )


def test_fsdp_is_what_the_methods_need(plugin_of: Any) -> None:
    plugin = plugin_of(FOLDER / "fsdp2.yaml")
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.ignored_modules is None


def test_the_line_that_keeps_bases_whole(plugin_of: Any, tmp_path: Path) -> None:
    from distributed.sharding import BASES

    text = (FOLDER / "fsdp2.yaml").read_text()
    assert text.count("# fsdp_ignored_modules") == 1
    (tmp_path / "fsdp2.yaml").write_text(text.replace("# fsdp_ignored_modules", "fsdp_ignored_modules"))
    assert plugin_of(tmp_path / "fsdp2.yaml").ignored_modules == BASES  # which test_fsdp.py trains with


def test_deepspeed_shards_no_parameter() -> None:
    arguments = read(FOLDER / "zero2.yaml")
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


def test_a_misspelt_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text((FOLDER / "ddp.yaml").read_text().replace("num_machines", "num_machine"))
    with pytest.raises(ValueError, match="num_machine"):
        read(tmp_path / "x.yaml")
