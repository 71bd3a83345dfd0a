"""--init_ckpt: a model of any world draws in a run's world what it drew in its own."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

import simple_trainer
import simple_trainer_hybrid_streamed
from configs import Config
from datasets.scene import Scene, load_scene
from errors import InputError
from tests.interrupted_runs import run_script, saved
from training.checkpoints import load_checkpoint
from training.commands import evaluate_command, resume_command, script_command, started_in
from training.dataset import load_dataset
from training.event_log import read_scalars
from training.measured import read_options
from training.ply import load_ply, save_ply
from training.pose_files import FILES
from training.similarity import moved
from training.starting_model import StartingModel
from training.views import posed_cameras, render


def picture(gaussians: dict[str, Tensor], scene: Scene, index: int = 0, camtoworld: np.ndarray | None = None) -> Tensor:
    camera = scene.cameras[scene.camera_indices[index]]
    pose = scene.camtoworlds[index] if camtoworld is None else camtoworld
    viewmats = torch.from_numpy(np.linalg.inv(pose)).float()[None]
    K = torch.from_numpy(camera.K).float()[None]
    cfg = Config()
    cameras = posed_cameras(viewmats, K, camera.width, camera.height, cfg)
    degree = round((gaussians["shN"].shape[1] + 1) ** 0.5) - 1
    return render(gaussians, cameras, cfg, sh_degree=degree)[0]


def any_transform(seed: int) -> np.ndarray:
    transform = np.eye(4)
    transform[:3, :3] = 2.5 * Rotation.random(random_state=seed).as_matrix()
    transform[:3, 3] = (3.0, -1.0, 2.0)
    return transform


def colourful(gaussians: dict[str, Tensor], degree: int = 3) -> dict[str, Tensor]:
    """The same Gaussians, longish, and with harmonics that differ by direction."""
    generator = torch.Generator().manual_seed(0)
    count = len(gaussians["means"])
    return {
        **gaussians,
        "scales": gaussians["scales"] + 0.5 * torch.randn(count, 3, generator=generator),
        "opacities": gaussians["opacities"] + 2,
        "shN": 0.2 * torch.randn(count, (degree + 1) ** 2 - 1, 3, generator=generator),
    }


def write_ply(path: Path, gaussians: dict[str, Tensor], transform: np.ndarray) -> Path:
    def rows(first: int, last: int) -> dict[str, Tensor]:
        return {name: value[first:last] for name, value in gaussians.items()}

    save_ply(path, rows, len(gaussians["means"]), transform)
    return path


def as_of_another_program(path: Path) -> Path:
    """Take away all that this suite's exports say of their world."""
    header, data = path.read_bytes().split(b"end_header\n", 1)
    lines = [line for line in header.split(b"\n") if not line.startswith(b"comment")]
    path.write_bytes(b"\n".join(lines) + b"end_header\n" + data)
    path.with_suffix(".json").unlink()
    return path


@pytest.fixture(scope="module")
def run(city_block, tmp_path_factory) -> Path:
    """The result folder of a short training, with a checkpoint and a PLY file."""
    result_dir = tmp_path_factory.mktemp("results") / "run"
    with pytest.MonkeyPatch.context() as patched:
        options = ("--max_steps", 6, "--sh_degree_interval", 1, "--num_workers", 1)
        assert run_script(patched, simple_trainer, city_block, result_dir, *options) == 0
    return result_dir


@pytest.fixture
def scene(city_block) -> Scene:
    return load_scene(city_block)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("degree", range(4))
def test_a_moved_model_draws_the_same_from_moved_cameras(run, scene, degree, seed):
    gaussians = colourful(saved(run, 6).gaussians, degree)
    transform = any_transform(seed)
    camtoworld = transform @ scene.camtoworlds[3]
    camtoworld[:3, :3] /= 2.5
    expected = picture(gaussians, scene, 3)
    assert expected.std() > 0.05
    actual = picture(moved(gaussians, transform), scene, 3, camtoworld)
    assert (actual - expected).abs().mean() < 1e-4
    if degree > 0:  # the harmonics have a part in it
        unturned = {**moved(gaussians, transform), "shN": gaussians["shN"]}
        assert (picture(unturned, scene, 3, camtoworld) - expected).abs().mean() > 1e-2


@pytest.mark.parametrize("begins", ["from a model", "from points"])
def test_a_subset_of_points_is_told_of_where_points_are_used(city_block, begins):
    said: list[str] = []
    given = {"init_ckpt": "model.ply"} if begins == "from a model" else {}
    dataset = load_dataset(Config(data_dir=str(city_block), max_gaussians=100, **given), None, said.append)
    is_told = any("subset" in sentence for sentence in said)
    assert is_told == (len(dataset.scene.points) == 100) == (begins == "from points")


def test_exports_begin_where_they_ended(run, scene):
    trained = saved(run, 6).gaussians
    for path in (run / "ckpts/ckpt_6.pt", run / "ply/point_cloud_6.ply"):
        said: list[str] = []
        placed = StartingModel.load(path).placed(scene.transform, Config(), said.append)
        assert "without Adam's moments" in said[0]
        assert len(said) == 1
        for name, value in trained.items():  # bit by bit, in another order
            flat, expected = (x.reshape(len(x), -1) for x in (placed[name], value))
            assert torch.equal(flat.double().sum(1).sort().values, expected.double().sum(1).sort().values)
        assert torch.allclose(picture(placed, scene), picture(trained, scene), atol=1e-6)


def test_files_of_other_worlds_draw_the_same(run, scene, tmp_path):
    """An export of the same dataset in another normalization, one whose header was lost, and another program's file."""
    gaussians = colourful(saved(run, 6).gaussians)
    expected = picture(gaussians, scene)
    other = any_transform(1)
    elsewhere = moved(gaussians, other @ np.linalg.inv(scene.transform))  # a run normalized the input by `other`
    paths = [write_ply(tmp_path / "a.ply", elsewhere, other), write_ply(tmp_path / "b.ply", elsewhere, other)]
    side_file = paths[1].with_suffix(".json").read_text()
    as_of_another_program(paths[1])
    paths[1].with_suffix(".json").write_text(side_file)
    in_input = moved(gaussians, np.linalg.inv(scene.transform))
    paths.append(as_of_another_program(write_ply(tmp_path / "c.ply", in_input, np.eye(4))))
    for path in paths:
        placed = StartingModel.load(path).placed(scene.transform, Config(), lambda sentence: None)
        assert (picture(placed, scene) - expected).abs().mean() < 1e-4, path


def test_harmonics_of_another_degree(run, scene, tmp_path):
    gaussians = colourful(saved(run, 6).gaussians, degree=1)
    path = write_ply(tmp_path / "a.ply", gaussians, scene.transform)
    for degree in (0, 1, 3):
        said: list[str] = []
        placed = StartingModel.load(path).placed(scene.transform, Config(sh_degree=degree), said.append)
        assert placed["shN"].shape[1] == (degree + 1) ** 2 - 1
        assert any("degree 1" in sentence for sentence in said) == (degree != 1)
        if degree > 0:
            assert torch.allclose(picture(placed, scene), picture(gaussians, scene), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("script", [simple_trainer, simple_trainer_hybrid_streamed])
def test_scripts_begin_from_a_file_and_resume_without_it(monkeypatch, run, city_block, tmp_path, capsys, script):
    options = ("--num_workers", 1, "--save_steps", 2)
    begun = (*options, "--max_steps", 2, "--init_ckpt", run / "ply/point_cloud_6.ply")
    assert run_script(monkeypatch, script, city_block, tmp_path / "run", *begun) == 0
    assert "Training begins from the" in capsys.readouterr().out
    assert "init_ckpt" not in resume_command()
    trained, first = saved(tmp_path / "run", 2), saved(run, 6)
    assert trained.steps == 2
    assert trained.options["init_ckpt"] == str(run / "ply/point_cloud_6.ply")
    there, begin = trained.gaussians["means"], first.gaussians["means"]
    assert torch.cdist(there, begin).min(dim=1).values.max() < 1e-2  # two steps of Adam, in units of the scene
    assert torch.cdist(there, torch.from_numpy(load_scene(city_block).points)).min(dim=1).values.median() > 0
    assert run_script(monkeypatch, script, city_block, tmp_path / "run", *options, "--max_steps", 4, "--resume") == 0
    printed = capsys.readouterr().out
    assert "Resuming after 2 steps" in printed
    assert "init_ckpt" not in printed
    for named in (saved(tmp_path / "run", 4).options, read_options(tmp_path / "run")):
        assert named["init_ckpt"] == str(run / "ply/point_cloud_6.ply")
    for checkpoint in (tmp_path / "run/ckpts").iterdir():  # as if it had been killed before the first of them
        checkpoint.unlink()
    assert run_script(monkeypatch, script, city_block, tmp_path / "run", *options, "--max_steps", 4, "--resume") == 2
    assert f"give --init_ckpt {run / 'ply/point_cloud_6.ply'} in place of --resume" in capsys.readouterr().err


def test_the_command_that_resumes_leaves_the_file_out(monkeypatch):
    for words in (["--init_ckpt", "a.ply"], ["--init-ckpt=a.ply"], ["--init_ckpt=a.ply"]):
        monkeypatch.setattr("sys.argv", ["a.py", "default", *words, "--seed", "3"])
        assert resume_command().endswith("a.py default --seed 3 --resume")


def test_commands_name_scripts_from_where_the_run_was_started(monkeypatch, tmp_path):
    root = Path(__file__).parents[1]
    for folder, name in ((root, "view.py"), (root.parent, f"{root.name}/view.py"), (tmp_path, f"{root}/view.py")):
        monkeypatch.chdir(folder)
        assert shlex.split(script_command("view.py", "a.pt"))[1:] == [name, "a.pt"]
        assert Path(started_in(), name).samefile(root / "view.py")


def test_the_command_that_evaluates_leaves_out_what_is_of_a_training(monkeypatch):
    words = ["--viewer", "80", "--viewer_host", "0.0.0.0", "--seed", "3", "--timelapse", "9", "--force", "--video"]
    words += ["--resume", "--new_photos", "--profile", "5"]
    for given in (words, [*words, "--viewer"]):
        monkeypatch.setattr("sys.argv", ["a.py", "default", *given])
        assert evaluate_command(Path("b.pt")).endswith("a.py default --seed 3 --video --ckpt b.pt")


def test_what_cannot_be_begun_from_is_refused(monkeypatch, run, city_block, tmp_path, capsys):
    def refusal(*options: object) -> str:
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "run", *options) == 2
        return capsys.readouterr().err

    file = run / "ckpts/ckpt_6.pt"
    assert "give one of them" in refusal("--init_ckpt", file, "--resume")
    assert "give one of them" in refusal("--init_ckpt", file, "--ckpt", file)
    assert "does not exist" in refusal("--init_ckpt", tmp_path / "none.ply")
    assert "--max_gaussians" in refusal("--init_ckpt", file, "--max_gaussians", 10)
    (tmp_path / "a.ply").write_bytes(b"ply\n")
    assert "a.ply" in refusal("--init_ckpt", tmp_path / "a.ply")
    (tmp_path / "a.pt").write_bytes(b"none")
    assert "a.pt" in refusal("--init_ckpt", tmp_path / "a.pt")
    gaussians = load_checkpoint(file).gaussians
    gaussians["means"] = gaussians["means"].clone()
    gaussians["means"][0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        StartingModel.load(write_ply(tmp_path / "b.ply", gaussians, np.eye(4)))
    gaussians["means"][0] = 0
    gaussians["shN"] = gaussians["shN"][:, :4]
    with pytest.raises(InputError, match="no degree"):
        StartingModel.load(write_ply(tmp_path / "b.ply", gaussians, np.eye(4)))
    assert len(load_ply(tmp_path / "b.ply")["means"]) == len(gaussians["means"])


@pytest.mark.parametrize(
    ("background", "sky", "now", "sentence"),
    [
        ("sky", {"rows": torch.zeros(1, 48)}, "black", "Its sky is not taken: --background is black."),
        ("sky", {"rows": torch.zeros(1, 48)}, "sky", "Its sky is not taken: a grey one is trained anew."),
        ("white", {}, "sky", "It was trained before white, and --background is sky."),
        ("white", {}, "white", None),
        ("random", {}, "black", None),
        ("black", {}, "white", None),  # a PLY file does not say before what it was trained
    ],
)
def test_what_was_behind_a_model_and_is_not_taken_is_told(background, sky, now, sentence):
    means = torch.rand(4, 3)
    gaussians = {
        "means": means, "scales": torch.zeros(4, 3), "quats": torch.ones(4, 4), "opacities": torch.zeros(4),
        "sh0": torch.zeros(4, 1, 3), "shN": torch.zeros(4, 15, 3),
    }  # fmt: skip
    said: list[str] = []
    model = StartingModel(Path("model.pt"), gaussians, np.eye(4), background=background, sky=sky)
    model.placed(np.eye(4), Config(background=now), said.append)
    assert said[1:] == ([] if sentence is None else [sentence])


def test_poses_that_the_gaussians_fit_are_told_of(tmp_path):
    run = tmp_path / "my run"
    gaussians = {"means": torch.rand(4, 3), "shN": torch.zeros(4, 15, 3)}
    gaussians |= {name: torch.zeros(4, 1) for name in ("scales", "quats", "opacities", "sh0")}
    checkpoint = tmp_path / "other/../my run/ckpts/ckpt_6.pt"
    model = StartingModel(checkpoint, gaussians, np.eye(4), has_own_poses=True)

    def told(**options: object) -> list[str]:
        said: list[str] = []
        model.placed(np.eye(4), Config(**options), said.append)
        return said[1:]

    without = "Its poses were corrected: the Gaussians do not fit those of the dataset, which photos have here"
    assert told() == [f"{without}; give --pose_opt to correct them anew."]
    assert told(pose_opt=True) == [f"{without}."]
    (run / "poses").mkdir(parents=True)
    (run / "poses/poses.json").write_text('{"steps": 6}')
    assert told() == told(pose_opt=True) == [f"{without}; give --model_dir '{run}/poses' to have the corrected ones."]
    assert told(model_dir=f"{run}/../my run/poses", pose_opt=True) == []


@pytest.mark.slow
def test_a_run_on_corrected_poses_begins_as_the_one_before_has_ended(monkeypatch, city_block, tmp_path, capsys):
    before, options = tmp_path / "before", ("--num_workers", 1, "--test_every", 4)
    posed = (*options, "--max_steps", 6, "--pose_opt", "--pose_opt_lr", 2e-2)
    assert run_script(monkeypatch, simple_trainer, city_block, before, *posed) == 0
    for file in (before / "ckpts/ckpt_6.pt", before / "ply/point_cloud_6.ply"):
        losses = []
        for with_poses in (False, True):
            folder = tmp_path / f"{file.suffix}{with_poses}"
            given = ("--model_dir", before / "poses") if with_poses else ()
            begun = (*options, "--max_steps", 1, "--log_every", 1, "--init_ckpt", file, "--sh_degree_interval", 1)
            assert run_script(monkeypatch, simple_trainer, city_block, folder, *begun, *given) == 0
            assert ("Its poses were corrected" in capsys.readouterr().out) == (not with_poses)
            losses.append(read_scalars(folder / "tb")["train/loss"][0].value)
        assert losses[1] < losses[0], losses
    assert sorted(path.name for path in (before / "poses").iterdir()) == sorted(FILES)
