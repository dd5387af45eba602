"""Who builds what, decided from values."""

from pathlib import Path

import pytest

from app.executor.builders import (
    Builder,
    EnvironmentBuilderMissing,
    EnvironmentNeedsConda,
    EnvironmentNeedsOtherPython,
    Tools,
    choose_builders,
    conda_packages,
    create_step,
    pip_step,
)
from app.registry.environment_spec import BASE_SPEC, parse_spec

BARE = Tools(conda=None, rattler=False, python_version="3.11.7")
WITH_RATTLER = Tools(conda=None, rattler=True, python_version="3.11.7")
WITH_CONDA = Tools(conda=Path("/opt/conda/bin/conda"), rattler=True, python_version="3.11.7")
OURS = parse_spec("channels: [main]\ndependencies: ['python>=3.11,<3.14', pip, {pip: [torch]}]")
FOREIGN = parse_spec("channels: [main]\ndependencies: [python, ffmpeg=7, libsndfile]")


class TestChooseBuilders:
    def test_conda_goes_first_and_alone(self) -> None:
        assert choose_builders(FOREIGN, WITH_CONDA) == [Builder.CONDA]

    def test_venv_stands_in_if_channels_do_not_answer(self) -> None:
        assert choose_builders(OURS, WITH_RATTLER) == [Builder.RATTLER, Builder.VENV]

    def test_venv_needs_nothing(self) -> None:
        assert choose_builders(OURS, BARE) == [Builder.VENV]

    def test_rattler_needs_channels(self) -> None:
        assert choose_builders(parse_spec(BASE_SPEC), WITH_RATTLER) == [Builder.VENV]

    def test_rattler_alone_if_venv_cannot(self) -> None:
        assert choose_builders(FOREIGN, WITH_RATTLER) == [Builder.RATTLER]

    def test_names_packages_that_need_conda(self) -> None:
        with pytest.raises(EnvironmentNeedsConda, match=r"ffmpeg=7, libsndfile\. Move them under \"pip:\""):
            choose_builders(FOREIGN, BARE)

    def test_names_python_that_is_asked_for_and_the_one_that_is_there(self) -> None:
        with pytest.raises(EnvironmentNeedsOtherPython, match=r"python>=3\.13.*3\.11\.7"):
            choose_builders(parse_spec("dependencies: ['python>=3.13']"), BARE)

    @pytest.mark.parametrize("builder", [Builder.CONDA, Builder.RATTLER])
    def test_refuses_builder_that_is_not_there(self, builder: Builder) -> None:
        with pytest.raises(EnvironmentBuilderMissing, match=builder):
            choose_builders(OURS, BARE, wanted=builder)

    def test_takes_builder_that_is_wanted(self) -> None:
        assert choose_builders(OURS, WITH_CONDA, wanted=Builder.VENV) == [Builder.VENV]
        with pytest.raises(EnvironmentNeedsConda):
            choose_builders(FOREIGN, WITH_CONDA, wanted=Builder.VENV)


class TestSteps:
    def test_conda_gets_channels_and_packages(self) -> None:
        spec = parse_spec("channels: [main, nodefaults]\ndependencies: ['python>=3.11', {pip: [torch]}]")

        step = create_step(Builder.CONDA, spec, Path("/envs/x"), WITH_CONDA)

        assert step.argv == (
            *("/opt/conda/bin/conda", "create", "--yes", "--prefix", "/envs/x", "--override-channels"),
            *("--channel", "main", "python>=3.11", "pip"),
        )

    def test_python_and_pip_are_added_where_a_stage_needs_them(self) -> None:
        assert conda_packages(parse_spec("dependencies: [numpy]")) == ["numpy", "python"]
        assert conda_packages(parse_spec("dependencies: [{pip: [x]}]")) == ["python", "pip"]

    def test_no_pip_step_without_pip_packages(self) -> None:
        assert pip_step(parse_spec(BASE_SPEC), Path("/envs/x")) is None
