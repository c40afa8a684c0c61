"""The command line is run as users run it: in a process of its own, whose exit code and output are what counts."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import sys, types
train = types.ModuleType("longlive.train")
exec({body!r}, train.__dict__)
sys.modules["longlive.train"] = train
from longlive.cli import main
sys.exit(main())
"""
"""The command line with a `train` of our own, which needs neither data nor torch."""

CONFIG = """
seed: 0
directory: run
trainer: {max_steps: 10}
hydra: {run: {dir: run}, sweep: {dir: "${directory}", subdir: "${hydra.job.override_dirname}"}}
"""


def longlive(*arguments: str, cwd: Path, body: str = "", env: dict[str, str] | None = None):
    """Run `longlive <arguments>` with `body` as the source of `longlive.train`."""
    program = PROGRAM.format(body=textwrap.dedent(body))
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder with a primary file `probe.yaml`."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "probe.yaml").write_text(CONFIG)
    return tmp_path


PROBE = ("train", "--config-dir", "conf", "--config-name", "probe")


STARTING = """
    def train(config):
        raise SystemExit("started")
    """

REFUSING = """
    def train(config):
        raise ValueError("heads=5 does not divide dim=128; use 4")
    """


def test_help_lists_the_commands_without_loading_anything_heavy(tmp_path):
    program = "import sys, longlive.cli as cli; cli.main(['--help']); print({'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    for command in ("train", "generate", "export", "shards", "doctor"):
        assert f"\n  {command} " in done.stdout
    root = Path(__file__).resolve().parent.parent
    assert f"configs: {root / 'conf'}\nrecipes: {root / 'recipes'}\n" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_what_torchao_says_when_it_is_imported_is_left_out_and_nothing_else(tmp_path):
    """Three warnings about missing kernels before every run on a machine that needs none of them."""
    program = """
        import logging
        logging.basicConfig()
        import longlive.cli, longlive.train
        logging.getLogger("torchao").warning("this layer is not supported")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "WARNING:torchao:this layer is not supported\n"


def test_the_version_is_printed(tmp_path):
    done = longlive("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "longlive 0.1.0.dev0\n")


def test_an_unknown_command_is_named_with_the_nearest(tmp_path):
    done = longlive("trian", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown command 'trian'; did you mean train?" in done.stderr
    assert longlive("fly", cwd=tmp_path).returncode == 2


def test_a_command_gets_the_composed_config_and_stays_in_the_working_directory(project):
    body = """
        import os
        def train(config):
            print("got", config.seed, config.trainer.max_steps, os.getcwd())
        """
    done = longlive(*PROBE, "trainer.max_steps=3", cwd=project, body=body)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"got 0 3 {project}\n"


def test_lightnings_launcher_sees_the_command_line_as_it_was_given(project):
    """It starts the other ranks with `sys.argv`: without the command's name every one of them would fail."""
    body = """
        import sys
        from hydra.core.hydra_config import HydraConfig
        def train(config):
            print(sys.argv[1:], HydraConfig.get().job.name)
        """
    done = longlive(*PROBE, "seed=1", cwd=project, body=body)
    assert done.stdout == f"{[*PROBE, 'seed=1']} train\n"
    again = longlive(*PROBE, "seed=1", "hydra.run.dir=run", "hydra.job.name=rank_1", cwd=project, body=body)
    assert again.stdout.endswith(" rank_1\n"), again.stderr


def test_a_sweep_runs_one_job_per_value_and_options_may_stand_anywhere(project):
    body = """
        def train(config):
            print("job", config.seed)
        """
    done = longlive(*PROBE, "seed=1,2", "-m", cwd=project, body=body)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("job")] == ["job 1", "job 2"]


@pytest.mark.parametrize(
    ("overrides", "directories"),
    [
        (("seed=1",), ["run"]),
        (("-m", "seed=1"), ["run"]),
        (("-m", "seed=1,2", "trainer.max_steps=3"), ["run/seed-1", "run/seed-2"]),
        (
            ("-m", "seed=1,2", "trainer.max_steps=3,4"),
            [f"run/seed-{s}+trainer.max_steps-{n}" for s in (1, 2) for n in (3, 4)],
        ),
        (("-m", "directory=a,b", "seed=range(1,3)"), ["a/seed-1", "a/seed-2", "b/seed-1", "b/seed-2"]),
    ],
)
def test_every_job_of_a_sweep_has_a_directory_of_its_own(project, overrides, directories):
    """The second job would continue from the first one's checkpoint, and train nothing; side by side, both would write
    to one folder."""
    done = longlive(*PROBE, *overrides, cwd=project, body="def train(config):\n    print('in', config.directory)\n")
    assert done.returncode == 0, done.stderr
    found = [line.removeprefix("in ") for line in done.stdout.splitlines() if line.startswith("in ")]
    assert [str((project / each).relative_to(project)) for each in found] == directories


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (("experiment=toyworld",), "runs/toyworld"),
        (("experiment=quickstart", "directory=elsewhere"), "elsewhere"),
        (("experiment=toyworld_long", "shared_directory=data"), "data"),
        (("experiment=toyworld", "text=umt5", "text.encoder.folder=t5"), "runs/toyworld"),
    ],
)
def test_the_jobs_of_a_sweep_read_what_lies_in_the_sweeps_directory(tmp_path, overrides, shared):
    """Shards in the folders of jobs that have not run are what a sweep of the documentation would look for."""
    body = """
        def train(config):
            print("job", config.directory, config.callbacks.checkpoint.dirpath)
            print("reads", config.data.train, config.text.get("folder"))
        """
    done = longlive("train", *overrides, "-m", "seed=0,1", cwd=tmp_path, body=body)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    folder = f"{shared}/prompt_embeds" if "text=umt5" in overrides else "None"
    assert [line[1:] for line in lines if line[0] == "reads"] == [[f"{shared}/shards", folder]] * 2
    jobs = [line[1:] for line in lines if line[0] == "job"]
    assert [Path(directory).name for directory, _ in jobs] == ["seed-0", "seed-1"]
    assert all(checkpoints == f"{directory}/checkpoints" for directory, checkpoints in jobs)


def test_an_unknown_key_is_one_message_and_nothing_is_started(project):
    done = longlive(*PROBE, "trainer.max_step=3", cwd=project, body=STARTING)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "unknown key 'trainer.max_step'" in done.stderr
    assert "did you mean trainer.max_steps?" in done.stderr
    assert [path.name for path in project.iterdir()] == ["conf"]


def test_a_setting_that_was_not_given_is_one_message_but_the_config_can_be_shown(project):
    (project / "conf" / "probe.yaml").write_text(
        CONFIG.replace("run: {dir: run}", "run: {dir: '${out}'}") + "out: ???\n"
    )
    done = longlive(*PROBE, cwd=project, body=STARTING)
    assert done.returncode == 1
    assert done.stderr == "longlive train: these settings must be given: out=...\n"
    assert "out: ???" in longlive(*PROBE, "--cfg", "job", cwd=project).stdout


def test_the_config_can_be_shown_without_running(project):
    done = longlive(*PROBE, "--cfg", "job", "seed=7", cwd=project, body=STARTING)
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout


def test_a_refused_setting_is_one_message_and_a_failure(project):
    done = longlive(*PROBE, cwd=project, body=REFUSING)
    assert done.returncode == 1
    assert "\nlonglive train: heads=5 does not divide dim=128; use 4\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR=1" in done.stderr


def test_a_file_that_is_not_there_is_one_message_if_our_words_say_so(project):
    body = """
        def train(config):
            raise FileNotFoundError("nov is no directory; `longlive shards` writes one")
        """
    done = longlive(*PROBE, cwd=project, body=body)
    assert done.returncode == 1
    assert "\nlonglive train: nov is no directory; `longlive shards` writes one\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_hydras_variable_shows_where_a_setting_was_refused(project):
    done = longlive(*PROBE, cwd=project, body=REFUSING, env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: heads=5" in done.stderr


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("raise RuntimeError('the loss is infinite at step 7')", "RuntimeError: the loss is infinite at step 7"),
        ("import json; json.loads('{')", "JSONDecodeError"),
        ("{}['latents']", "KeyError: 'latents'"),
        ("open('gone')", "FileNotFoundError: [Errno 2] No such file or directory: 'gone'"),
    ],
)
def test_every_other_exception_keeps_its_traceback_and_fails(project, statement, shown):
    """A crash that is caught and printed ends with exit code 0, and the launcher believes that the run is done."""
    done = longlive(*PROBE, cwd=project, body=f"def train(config):\n    {statement}\n")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert shown in done.stderr


def test_a_failing_job_of_a_sweep_fails_the_sweep(project):
    body = """
        def train(config):
            if config.seed == 2:
                raise ValueError("seed=2 is refused")
        """
    done = longlive(*PROBE, "-m", "seed=1,2,3", cwd=project, body=body)
    assert done.returncode == 1
    assert "seed=2 is refused" in done.stderr


def test_the_exit_code_of_a_command_that_exits_is_kept(project):
    done = longlive(*PROBE, cwd=project, body="import sys\ndef train(config):\n    sys.exit(7)\n")
    assert done.returncode == 7


def test_strict_shards_may_be_written_as_a_flag(project):
    program = textwrap.dedent(
        """
        import sys, types
        module = types.ModuleType("longlive.make_shards")
        module.make_shards = lambda config: print("strict", config.strict)
        sys.modules["longlive.make_shards"] = module
        from longlive.cli import main
        sys.exit(main())
        """
    )
    (project / "conf" / "probe.yaml").write_text(CONFIG + "strict: false\n")
    command = [sys.executable, "-c", program, "shards", *PROBE[1:], "--strict"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "strict True\n", done.stderr
